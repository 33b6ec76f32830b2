"""What is shared, what is not, and what a hit saves."""

from typing import Any

import pytest

from manta.scheduler.prefix import root_hash
from tests.support.deployment import VOCAB_SIZE, Deployment, capacity, request

PROMPT = list(range(10))


def cached_tokens(first: dict[str, Any], second: dict[str, Any], **options: Any) -> int:
    """Tokens of the second request that are found after the first has ended."""
    deployment = Deployment(capacity(block_size=4), **options)
    deployment.add(request(0, PROMPT, **first))
    deployment.run()
    deployment.add(request(1, second.pop("prompt", PROMPT), **second))
    deployment.run()
    deployment.assert_all_as_alone()
    return deployment.started[1].num_cached_tokens


@pytest.mark.parametrize(
    ("prompt", "num_cached"),
    [
        (PROMPT, 8),
        ([*PROMPT[:8], 19, 19], 8),
        ([*PROMPT[:7], 19, 19, 19], 4),
        (PROMPT[:3], 0),
        ([19, *PROMPT[1:]], 0),
        (PROMPT[4:] + PROMPT, 0),
        (PROMPT[:8], 7),  # all is cached: the last token is computed in a copy of its block
    ],
)
def test_full_blocks_of_an_equal_prefix_are_shared(prompt: list[int], num_cached: int) -> None:
    assert cached_tokens({}, {"prompt": prompt}) == num_cached


@pytest.mark.parametrize(
    ("first", "second", "num_cached"),
    [
        ({"salt": b"a"}, {"salt": b"a"}, 8),
        ({"salt": b"a"}, {"salt": b"b"}, 0),
        ({}, {"salt": b"a"}, 0),
        ({"adapter": "a", "sampling": "a"}, {"adapter": "a", "sampling": "a"}, 8),
        ({"adapter": "a", "sampling": "a"}, {"adapter": "b", "sampling": "b"}, 0),
        ({"adapter": "a", "sampling": "a"}, {}, 0),
    ],
)
def test_salt_and_adapter_keep_requests_apart(first: dict[str, Any], second: dict[str, Any], num_cached: int) -> None:
    assert cached_tokens(first, second) == num_cached


def test_salt_and_adapter_cannot_be_mistaken_for_each_other() -> None:
    assert root_hash(b"ab", "c") != root_hash(b"a", "bc")


def test_nothing_is_shared_with_caching_off() -> None:
    assert cached_tokens({}, {}, enable_prefix_caching=False) == 0


def test_an_answer_is_part_of_the_next_turns_prefix() -> None:
    deployment = Deployment(capacity(block_size=4))
    deployment.add(request(0, PROMPT, max_tokens=8))
    deployment.run()
    deployment.add(request(1, PROMPT + deployment.tokens[0] + [1, 2]))
    deployment.run()
    assert deployment.started[1].num_cached_tokens == 16  # 17 of the 18 tokens have KV
    deployment.assert_all_as_alone()


def test_a_whole_prompt_in_the_cache_costs_one_token_and_a_copy() -> None:
    deployment = Deployment(capacity(block_size=4))
    for id in range(2):
        deployment.add(request(id, list(range(12)), max_tokens=3))
        plan = deployment.step()
        deployment.run()
    assert plan is not None
    (add,) = plan.adds
    assert (add.num_computed, plan.num_tokens) == (11, 1)
    assert [destination for _, destination in plan.copies] == [add.blocks[2]]
    deployment.assert_all_as_alone()


def test_running_sequences_share_blocks() -> None:
    deployment = Deployment(capacity(block_size=4))
    deployment.add(request(0, PROMPT, max_tokens=20))
    deployment.step()
    deployment.add(request(1, [*PROMPT, 3, 4], max_tokens=20))
    deployment.step()
    first, second = deployment.scheduler.snapshot().sequences
    assert first.blocks[:2] == second.blocks[:2]
    assert (first.ref_counts, second.ref_counts) == ([2, 2, 1], [2, 2, 1])
    deployment.run()
    deployment.assert_all_as_alone()


def test_a_running_sequences_answer_is_shared_as_it_grows() -> None:
    deployment = Deployment(capacity(block_size=4))
    deployment.add(request(0, PROMPT, max_tokens=20))
    for _ in range(8):
        deployment.step()
    deployment.add(request(1, PROMPT + deployment.tokens[0]))
    deployment.run()
    assert deployment.started[1].num_cached_tokens == 16
    deployment.assert_all_as_alone()


def test_a_shared_prefix_outlives_the_tails() -> None:
    deployment = Deployment(capacity(block_size=4, num_blocks=8))
    deployment.add(request(0, PROMPT[:8] + [15] * 8, max_tokens=1))
    deployment.run()
    deployment.add(request(1, 18, max_tokens=2))  # 5 blocks: 4 blank ones and the longest unused
    deployment.run()
    deployment.add(request(2, PROMPT[:8] + [15] * 9, max_tokens=1))
    deployment.run()
    assert deployment.started[2].num_cached_tokens == 12
    deployment.assert_all_as_alone()


def test_counters_are_in_tokens_and_count_each_request_once() -> None:
    deployment = Deployment(capacity(block_size=4, num_blocks=6))
    for id in range(3):
        deployment.add(request(id, PROMPT, max_tokens=9))
        deployment.run()
    counters = deployment.scheduler.counters
    assert (counters.num_prefix_queries, counters.num_prefix_hits) == (30, 16)


def test_answers_of_many_sequences_are_found_while_they_run() -> None:
    """Filled blocks are published together: nobody who looks may miss them, whichever way they were filled."""
    deployment = Deployment(capacity(block_size=4, num_blocks=200, max_num_seqs=9, max_num_batched_tokens=64))
    for id in range(8):  # some prompts end with their block
        deployment.add(request(id, 5 + id % 4, max_tokens=20))
    for _ in range(12):
        deployment.step()
    for id in range(8):
        text = deployment.requests[id].prompt.tolist() + deployment.tokens[id]
        deployment.add(request(100 + id, [*text[:12], VOCAB_SIZE - 1 - text[12]], max_tokens=1))
        while 100 + id not in deployment.finished:
            deployment.step()
        assert deployment.started[100 + id].num_cached_tokens == 12
    deployment.run()
    deployment.assert_all_as_alone()


@pytest.mark.parametrize("budget", [16, 64])
@pytest.mark.parametrize("num_own", [0, 1, 3])
def test_requests_that_come_together_compute_their_prefix_once(num_own: int, budget: int) -> None:
    """One step writes all KV before it reads any: whoever is admitted behind the first shares its blocks at once."""
    deployment = Deployment(capacity(block_size=4, max_num_seqs=8, max_num_batched_tokens=budget))
    shared = list(range(12))
    for index in range(6):
        deployment.add(request(index, [*shared, *([index] * num_own)], max_tokens=1))
    deployment.run()
    deployment.assert_all_as_alone()
    (worker,) = deployment.workers
    # A prompt without tokens of its own computes its last block again: what a step writes it cannot copy yet.
    computed_again = num_own or 4
    assert worker.num_computed_tokens <= 12 + num_own + 5 * computed_again
