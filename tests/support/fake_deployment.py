"""An engine with fake workers behind real gRPC, all on the test's event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from manta.cluster.engine.bringup import bring_up
from manta.cluster.engine.client import EngineClient, GenerationRequest, TokenChunk
from manta.cluster.engine.engine import Engine
from manta.cluster.engine.replica import Deadlines
from manta.cluster.engine.revival import find_workers
from manta.cluster.engine.service import EngineServer
from manta.configs.model import ModelSpec, parse_model_spec
from manta.configs.sampling import SamplingParams
from manta.configs.schema import ServeConfig
from tests.support.fake_worker_server import VOCAB_SIZE, FakeWorker, FakeWorkerServer, Transport

TEST_TIMEOUT_S = 60.0
FAST = Deadlines(step_s=0.5, step_per_token_s=0.0, probe_s=1.0, check_every_s=0.05)
EOS = VOCAB_SIZE + 1  # outside the vocabulary: the fake model never says it


def run(test: Coroutine[Any, Any, None]) -> None:
    """Runs an async test with a deadline."""
    asyncio.run(asyncio.wait_for(test, TEST_TIMEOUT_S))


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    """Yields to the loop until `condition()`; fails with `what` when the time is over."""
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline_s, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.005)


def fake_spec(max_position: int = 512, eos_token_id: int = EOS) -> ModelSpec:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "max_position_embeddings": max_position,
        "eos_token_id": eos_token_id,
    }
    return parse_model_spec(config, {})


def fake_config(**overrides: Any) -> ServeConfig:
    fields = {"model": "fake", "block_size": 8, "max_num_seqs": 16, "max_num_batched_tokens": 64}
    return ServeConfig.model_validate(fields | overrides)


def request(prompt: list[int], max_tokens: int, seed: int = 0, name: str = "r", **sampling: Any) -> GenerationRequest:
    params = SamplingParams.model_validate({"max_tokens": max_tokens, "seed": seed} | sampling)
    return GenerationRequest(name, prompt, params)


async def collect(chunks: AsyncIterator[TokenChunk]) -> tuple[list[int], TokenChunk]:
    """All tokens of a request and its last chunk."""
    tokens: list[int] = []
    async for chunk in chunks:
        tokens += chunk.token_ids
    return tokens, chunk


@dataclass
class FakeDeployment:
    engine: Engine
    server: EngineServer
    client: EngineClient
    address: str
    workers: list[list[FakeWorker]]
    servers: list[list[FakeWorkerServer]]
    lost: list[tuple[int, str]]

    def check_pool(self) -> None:
        """Nothing runs, and every block is free."""
        self.engine.scheduler.check()
        assert self.engine.scheduler.num_running == self.engine.scheduler.num_waiting == 0
        load = self.engine.load()
        assert load.num_free_blocks == load.num_blocks

    async def start_engine_anew(self) -> None:
        """A scheduler process that has died and is started again: another engine at the same address, which finds the
        workers as they are."""
        addresses = [[server.address for server in replica] for replica in self.servers]
        config, spec = self.engine.config, self.engine._spec
        deployment = await find_workers(config, spec, addresses)
        self.engine = Engine(config, spec, deployment, deadlines=FAST, replaces_workers=True)
        self.engine.start()
        self.server = await EngineServer.start(self.engine, "127.0.0.1", int(self.address.rpartition(":")[2]))

    async def kill_engine(self) -> None:
        """No request is told anything."""
        await self.server.stop(None)
        for task in self.engine._tasks.values():
            task.cancel()
        await asyncio.gather(*self.engine._tasks.values(), return_exceptions=True)
        await self.engine.deployment.close()

    async def replace(self, replica: int) -> None:
        """New workers for a replica."""
        old = self.servers[replica]
        self.servers[replica] = [FakeWorkerServer(type(server.worker)(), server.transport) for server in old]
        addresses = [await server.start() for server in self.servers[replica]]
        self.workers[replica] = [server.worker for server in self.servers[replica]]
        for server in old:
            await server.stop()
        await self.engine.replace_workers(replica, addresses)

    async def add(self, replica: int) -> None:
        """Workers where there are none."""
        number = self.engine.config.num_ranks
        self.servers[replica] = [FakeWorkerServer(type(self.workers[0][0])(), "unix") for _ in range(number)]
        addresses = [await server.start() for server in self.servers[replica]]
        self.workers[replica] = [server.worker for server in self.servers[replica]]
        await self.engine.replace_workers(replica, addresses)

    async def settled(self) -> None:
        """Waits until no plan is in flight, then checks the pool."""
        scheduler = self.engine.scheduler
        replicas = range(len(self.workers))
        await until(lambda: not any(scheduler.num_in_flight(i) for i in replicas), "all plans answered")
        self.check_pool()


@asynccontextmanager
async def fake_deployment(
    config: ServeConfig | None = None,
    spec: ModelSpec | None = None,
    make_worker: Callable[[], FakeWorker] = FakeWorker,
    transport: Transport = "unix",
    **engine_options: Any,
) -> AsyncIterator[FakeDeployment]:
    """Workers for every rank of every replica, brought up; an engine; a connected client."""
    config, spec = config or fake_config(), spec or fake_spec()
    servers = [
        [FakeWorkerServer(make_worker(), transport) for _ in range(config.num_ranks)]
        for _ in range(config.num_replicas_at_start)
    ]
    addresses = [[await server.start() for server in replica] for replica in servers]
    lost: list[tuple[int, str]] = []
    deployment = await bring_up(config, spec, addresses)
    options: dict[str, Any] = {
        "deadlines": FAST,
        "on_replica_lost": lambda index, reason: lost.append((index, reason)),
    } | engine_options
    engine = Engine(config, spec, deployment, **options)
    engine.start()
    server = await EngineServer.start(engine, "127.0.0.1", 0)
    client = await EngineClient.connect(server.address)
    workers = [[server.worker for server in replica] for replica in servers]
    fake = FakeDeployment(engine, server, client, server.address, workers, servers, lost)
    try:
        yield fake
    finally:
        await client.close()
        await fake.engine.stop()
        await fake.server.stop(None)
        for replica in servers:
            for worker_server in replica:
                await worker_server.stop()
