"""What the tests of the keeper share."""

from collections.abc import Callable, Iterator

import pytest

from tests.support.keeper_world import World


@pytest.fixture
def make() -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def new(**config: object) -> World:
        worlds.append(World(**config))
        return worlds[-1]

    yield new
    for world in worlds:
        world.close()
