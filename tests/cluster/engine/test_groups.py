"""Several sequences of one prompt are one submit, with fake workers that refuse wrong differences."""

import asyncio
from dataclasses import replace

import pytest

from manta.cluster.engine.client import EngineClient, InvalidRequestError
from manta.cluster.engine.types import Beams, GenerationRequest
from tests.support.fake_deployment import collect, fake_config, fake_deployment, request, run
from tests.support.fake_worker_server import FakeWorker, fake_tokens


def several(prompt: list[int], max_tokens: int, n: int, seed: int) -> list[GenerationRequest]:
    return [request(prompt, max_tokens, seed=seed + i) for i in range(n)]


@pytest.mark.parametrize("caching", [True, False])
def test_each_draws_with_its_own_seed(caching: bool) -> None:
    async def test() -> None:
        config = fake_config(enable_prefix_caching=caching)
        async with fake_deployment(config, make_worker=lambda: FakeWorker(num_blocks=64)) as deployment:
            client = await EngineClient.connect(deployment.address)
            for length in (1, 15, 16, 90):
                prompt = [(3 * i + length) % 1000 for i in range(length)]
                group = client.generate_group(several(prompt, 9, 5, seed=7))
                results = await asyncio.gather(*(collect(group.chunks(place)) for place in range(5)))
                group.close()
                for place, (tokens, last) in enumerate(results):
                    assert tokens == fake_tokens(prompt, 9, seed=7 + place)
                    assert last.finish_reason == "length"
            await deployment.settled()
            assert not deployment.lost
            await client.close()

    run(test())


def test_closing_a_group_aborts_those_that_nobody_reads() -> None:
    async def test() -> None:
        async with fake_deployment(fake_config(), make_worker=lambda: FakeWorker(num_blocks=64)) as deployment:
            client = await EngineClient.connect(deployment.address)
            group = client.generate_group(several([1, 2, 3], 200, 4, seed=1))
            chunks = group.chunks(2)
            await anext(chunks)
            await chunks.aclose()
            group.close()
            await deployment.settled()
            await client.close()

    run(test())


def test_all_are_refused_together() -> None:
    async def test() -> None:
        async with fake_deployment(fake_config(), make_worker=lambda: FakeWorker(num_blocks=64)) as deployment:
            client = await EngineClient.connect(deployment.address)
            requests = [replace(one, beams=Beams(width=2)) for one in several([1, 2, 3], 5, 3, seed=1)]
            group = client.generate_group(requests)
            for place in range(3):
                with pytest.raises(InvalidRequestError, match="a beam search of width 2 cannot give 3 sequences"):
                    await collect(group.chunks(place))
            group.close()
            await deployment.settled()
            await client.close()

    run(test())
