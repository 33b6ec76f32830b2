"""Two workers, one of them in a network namespace of its own, on another cable: it is cut, and connections are dropped,
while requests run. No process dies and no socket is closed by a cut: only silence tells."""

import asyncio
from collections.abc import Callable, Iterator

import pytest

from manta.cluster.engine.client import EngineClient
from manta.cluster.engine.types import GenerationRequest
from manta.protos import engine_pb2 as pb
from tests.support.cable import THERE, Cable, NoNamespaceError, deployment, laid_cable
from tests.support.fake_deployment import collect, request

REQUESTS = [
    *(request([5 + i, 9], 600, seed=i, ignore_eos=True, temperature=0.0) for i in range(4)),
    *(request([50 + i, 9], 600, seed=i, ignore_eos=True, temperature=1.0) for i in range(4)),
]


@pytest.fixture
def cable() -> Iterator[Cable]:
    try:
        with laid_cable() as cable:
            yield cable
    except NoNamespaceError as error:
        pytest.skip(str(error))


async def _tokens(client: EngineClient, disturb: Callable[[], object]) -> list[list[int]]:
    """Of all requests; `disturb` once some of them run on each worker."""

    async def read(one: GenerationRequest) -> list[int]:
        return (await collect(client.generate(one)))[0]

    running = [asyncio.create_task(read(one)) for one in REQUESTS]
    async with asyncio.timeout(60):
        while (load := await client.load()) and min(replica.num_running for replica in load.replicas) < 2:
            assert not all(task.done() for task in running), f"one of the workers got nothing: {load}"
            await asyncio.sleep(0.01)
    disturb()
    async with asyncio.timeout(120):
        return await asyncio.gather(*running)


def test_a_cable_is_cut(cable: Cable) -> None:
    async def test(address: str) -> None:
        client = await EngineClient.connect(address)
        try:
            undisturbed = await _tokens(client, lambda: None)
            dropped = ""

            def drop() -> None:
                nonlocal dropped
                dropped = cable.drop_connections()

            assert await _tokens(client, drop) == undisturbed
            states = [replica.state for replica in (await client.load()).replicas]
            assert states == [pb.ReplicaLoad.SERVING] * 2  # its process answers: it goes on with the same worker
            assert await _tokens(client, cable.cut) == undisturbed
            async with asyncio.timeout(20):  # it may be asked still whether it lives
                while (there := (await client.load()).replicas[0]).state != pb.ReplicaLoad.LOST:
                    await asyncio.sleep(0.05)
            assert f"at {THERE}" in there.detail
            assert "answer" in there.detail  # not, or not in time
            print(f"dropped: {dropped or 'nothing, the kernel cannot'}")
        finally:
            await client.close()

    with deployment(cable) as address:
        asyncio.run(test(address))
