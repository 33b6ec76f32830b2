"""Places for requests: never more taken than there are, in turn, and none lost by those who give up."""

import asyncio
import random

import pytest

from manta.cluster.places import Places


@pytest.mark.parametrize("seed", range(20))
def test_random_requests(seed: int) -> None:
    rng = random.Random(seed)
    num_taken = 0
    begun: list[int] = []

    async def request(places: Places, number: int, num_wanted: int) -> None:
        nonlocal num_taken
        async with places.taken(str(number), num_wanted):
            begun.append(number)
            num_taken += min(num_wanted, 5)
            try:
                assert num_taken <= 5
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                num_taken -= min(num_wanted, 5)

    async def run() -> None:
        places = Places(5)
        tasks = [asyncio.create_task(request(places, number, rng.randint(1, 7))) for number in range(60)]
        for task in rng.sample(tasks, 20):
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        errors = [task.exception() for task in tasks if not task.cancelled()]
        assert errors == [None] * len(errors)
        async with asyncio.timeout(5), places.taken("all", 5):
            pass  # every place was given back

    asyncio.run(run())
    assert begun == sorted(begun)
    assert num_taken == 0


def test_one_that_is_let_through_takes_none() -> None:
    async def run() -> None:
        places = Places(1)
        async with places.taken("first", 1):

            async def wait(name: str) -> None:
                async with places.taken(name, 1):
                    pass

            aborted, waiting = asyncio.create_task(wait("aborted")), asyncio.create_task(wait("waiting"))
            await asyncio.sleep(0)
            places.let_through("aborted")
            places.let_through("nobody")
            await aborted
            assert not waiting.done()
        await waiting

    asyncio.run(run())
