"""Two workers, one of them in a network namespace of its own, on another cable: it is cut, and connections are dropped,
while requests run. No process dies and no socket is closed by a cut: only silence tells."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from manta.cluster.engine.client import EngineClient
from manta.cluster.engine.types import GenerationRequest
from manta.configs.schema import ServeConfig
from manta.protos import engine_pb2 as pb
from tests.support.fake_deployment import collect, request
from tests.support.server import DEMO_MODEL

_NET = f"10.213.{os.getpid() // 64 % 256}.{{}}"
HERE, THERE = (_NET.format(os.getpid() % 64 * 4 + host) for host in (1, 2))
CONFIG = ServeConfig.model_validate(
    {"model": str(DEMO_MODEL), "dtype": "float32", "data_parallel_size": 2, "kv_cache_memory_bytes": 64 * 2**20,
     "max_num_seqs": 4}
)  # fmt: skip
REQUESTS = [
    *(request([5 + i, 9], 600, seed=i, temperature=0.0) for i in range(4)),
    *(request([50 + i, 9], 600, seed=i, temperature=1.0) for i in range(4)),
]


@dataclass
class Cable:
    """Between this network namespace and another one."""

    namespace: str

    def run(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return done.stdout

    def cut(self) -> None:
        self.run("ip", "-n", self.namespace, "link", "set", "dev", f"{self.namespace}b", "down")

    def mend(self) -> None:
        self.run("ip", "-n", self.namespace, "link", "set", "dev", f"{self.namespace}b", "up")

    def drop_connections(self) -> str:
        """What the kernel has ended; empty where it is built without that."""
        return self.run("ss", "--no-header", "-K", "-t", "dst", THERE)


@pytest.fixture
def cable() -> Iterator[Cable]:
    if shutil.which("ip") is None or shutil.which("ss") is None:
        pytest.skip("the commands ip and ss are missing")
    cable = Cable(f"mt{os.getpid() % 10**7}")
    name = cable.namespace
    try:
        cable.run("ip", "netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made: {error.stderr.strip()}")
    try:
        cable.run("ip", "link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b", "netns", name)
        cable.run("ip", "addr", "add", f"{HERE}/30", "dev", f"{name}a")
        cable.run("ip", "link", "set", "dev", f"{name}a", "up")
        cable.run("ip", "-n", name, "addr", "add", f"{THERE}/30", "dev", f"{name}b")
        cable.run("ip", "-n", name, "link", "set", "dev", "lo", "up")
        cable.mend()
        yield cable
    finally:
        subprocess.run(("ip", "link", "del", f"{name}a"), check=False)  # at once; that of the namespace takes a while
        cable.run("ip", "netns", "del", name)


@contextmanager
def _process(*words: str) -> Iterator[str]:
    """The address that it says it serves at."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert child.stdout is not None
        first = next((line for line in child.stdout if line.startswith("MANTA_")), "")
        assert first.startswith("MANTA_ADDRESS"), f"{words[2]} did not come up: {first}"
        yield first.split()[1]
    finally:
        child.kill()
        child.wait(10)
        child.stdout.close()


@contextmanager
def _deployment(cable: Cable) -> Iterator[str]:
    """The address of a scheduler with a worker here and one there."""
    worker = (sys.executable, "-m", "manta.workers.main")
    with ExitStack() as stack:
        there = stack.enter_context(_process("ip", "netns", "exec", cable.namespace, *worker, "--host", THERE))
        here = stack.enter_context(_process(*worker, "--host", HERE))
        scheduler = sys.executable, "-m", "manta.cluster.engine.main", "--config-json", CONFIG.model_dump_json()
        address = stack.enter_context(_process(*scheduler, "--workers", f"{there};{here}"))
        yield address


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

    with _deployment(cable) as address:
        asyncio.run(test(address))
