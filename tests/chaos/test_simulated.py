"""What dies, stops, is cut off or answers wrongly, by seed, on a virtual clock: the real engine, clients, links and
services with fake workers, in this process (tests/support/simulation). `bench/fault_seeds.py` runs as many seeds as one
likes, and one alone with a log of what happened."""

import pytest

from tests.support.simulation.story import Story, make_story, play

NUM_SEEDS = 200
SEEDS_PER_TEST = 10


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, SEEDS_PER_TEST))
def test_nothing_is_lost_or_repeated(first: int) -> None:
    for seed in range(first, first + SEEDS_PER_TEST):
        story = make_story(seed)
        try:
            play(story, seed)
        except Exception as error:
            raise AssertionError(f"seed {seed} ({_told(story)}): {error.__cause__ or error}") from error


def _told(story: Story) -> str:
    return ", ".join(f"{what} at {at_s:.2f} s" for at_s, what in story.faults)
