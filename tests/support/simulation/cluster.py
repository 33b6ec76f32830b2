"""A deployment in one event loop: the real engine, its clients, bring-up, revival, links and services, over a simulated
network, with fake workers, and an operator that starts again what has died, as `cluster/launch/keeper.py` does."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import pytest

from manta.cluster import link_listener, links
from manta.cluster.engine import client as client_module
from manta.cluster.engine import mover as mover_module
from manta.cluster.engine import replica as replica_module
from manta.cluster.engine.bringup import BringUpError, bring_up
from manta.cluster.engine.client import EngineClient
from manta.cluster.engine.engine import Engine
from manta.cluster.engine.revival import find_workers
from manta.cluster.engine.service import EngineServer
from manta.cluster.engine.workers import WorkerError
from manta.configs.schema import ServeConfig
from manta.protos import engine_pb2 as pb
from manta.protos import engine_pb2_grpc
from tests.support.fake_deployment import fake_spec
from tests.support.simulation.loop import Process, VirtualTime
from tests.support.simulation.net import Network, SocketModule
from tests.support.simulation.rpc import Channel, RpcServer
from tests.support.simulation.worker import Mesh, SimWorker

_LOOK_S = 0.25
_CALL_TIMEOUT_S = 1.5
_NUM_SILENT = 3
_RETRY_S = 1.0


@contextmanager
def simulated(network: Network) -> Iterator[None]:
    """The engine's modules live on the network and by the loop's clock."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpc.aio, "insecure_channel", lambda address, options=(): Channel(network, address, options))
        patch.setattr(grpc.aio, "server", lambda *_, **__: RpcServer(network))
        patch.setattr(links, "_connect_tcp", network.connect)
        patch.setattr(link_listener, "socket", SocketModule(network))
        for module in (client_module, mover_module, replica_module):
            patch.setattr(module, "time", VirtualTime)
        yield


@dataclass
class Sizes:
    """Of workers."""

    num_blocks: int
    step_s: float


class Cluster:
    """Build it with `await Cluster.start(...)`. Processes are named "scheduler", "worker 0.1" and as clients are."""

    def __init__(self, network: Network, config: ServeConfig, sizes: Sizes, rng: random.Random) -> None:
        self.network = network
        self.config = config
        self.rng = rng
        self.engine: Engine | None = None
        self.server: EngineServer | None = None
        self.scheduler = Process("scheduler")
        self.workers: list[list[SimWorker]] = [[] for _ in range(config.max_num_replicas)]
        self.meshes: list[Mesh] = []
        self.address = ""
        self.dies_in_load = 0  # so many of the next workers
        self._addresses: list[list[str]] = [[] for _ in self.workers]
        self._sizes = sizes
        self._repairs: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._spawning: set[int] = set()
        self._operator: asyncio.Task[None] | None = None
        self._is_closing = False

    @classmethod
    async def start(cls, network: Network, config: ServeConfig, sizes: Sizes, rng: random.Random) -> "Cluster":
        cluster = cls(network, config, sizes, rng)
        for replica in range(config.num_replicas_at_start):
            await cluster._start_workers(replica)
        cluster.address = network.new_address()
        await cluster.scheduler.spawn(cluster._start_engine(takes_over=False))
        cluster._operator = asyncio.create_task(cluster._operate())
        return cluster

    async def connect(self, name: str) -> tuple[Process, EngineClient]:
        process = Process(name)
        return process, await process.spawn(EngineClient.connect(self.address))

    def processes(self, replica: int) -> list[Process]:
        return [worker.process for worker in self.workers[replica]]

    async def settled(self) -> None:
        """Every replica serves, and no plan is unanswered."""
        while not self._is_whole():
            await asyncio.sleep(0.1)
        await asyncio.sleep(1.0)  # ends of clients are still on their way

    def _is_whole(self) -> bool:
        engine = self.engine
        workers = [process for replica in range(len(self.workers)) for process in self.processes(replica)]
        if engine is None or self._repairs:
            return False
        if any(process.is_stopped or not process.is_alive for process in (self.scheduler, *workers)):
            return False
        load = engine.load()
        replicas = range(len(self.workers))
        idle = not any(engine.scheduler.num_in_flight(replica) for replica in replicas)
        return idle and all(each.state == pb.ReplicaLoad.SERVING for each in load.replicas)

    async def close(self) -> None:
        """Everything ends in order."""
        self._is_closing = True
        assert self._operator is not None
        tasks = [self._operator, *self._repairs.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.engine is not None and self.server is not None:
            await self.scheduler.spawn(self.engine.stop())
            await self.scheduler.spawn(self.server.stop(None))
        for replica in range(len(self.workers)):
            for process in self.processes(replica):
                process.kill()

    async def _start_workers(self, replica: int) -> None:
        for process in self.processes(replica):
            process.kill()
        num_ranks = self.config.num_ranks
        mesh = Mesh(num_ranks)
        self.meshes.append(mesh)
        started = []
        for rank in range(num_ranks):
            process = Process(f"worker {replica}.{rank} of {len(self.meshes)}")
            args = process, self._sizes.num_blocks, self._sizes.step_s, mesh, rank
            worker, address = await process.spawn(SimWorker.start(self.network, *args))
            worker.faults.load_s = self.rng.choice((0.1, 1.0, 3.0))
            worker.faults.kill = process.kill
            if self.dies_in_load:
                self.dies_in_load -= 1
                worker.faults.dies_in_load = True
            started.append((worker, address))
        self.workers[replica] = [worker for worker, _ in started]
        self._addresses[replica] = [address for _, address in started]

    async def _start_engine(self, takes_over: bool) -> None:
        begin = find_workers if takes_over else bring_up
        deployment = await begin(self.config, fake_spec(), self._addresses)
        self.engine = Engine(self.config, fake_spec(), deployment, replaces_workers=True)
        self.engine.start()
        self.server = await EngineServer.start(self.engine, "127.0.0.1", int(self.address.rpartition(":")[2]))

    async def _operate(self) -> None:
        channel = Channel(self.network, self.address)
        stub = engine_pb2_grpc.EngineStub(channel)
        num_silent = 0
        while True:
            await asyncio.sleep(_LOOK_S)
            busy = set(self._repairs)
            broken = {("worker", replica) for replica in range(len(self.workers)) if self._has_died(replica)}
            load = None
            if ("scheduler", 0) in busy or not self.scheduler.is_alive:
                num_silent = 0
            else:
                with suppress(grpc.aio.AioRpcError):
                    load = await stub.GetLoad(pb.LoadRequest(), timeout=_CALL_TIMEOUT_S)
                num_silent = 0 if load is not None else num_silent + 1
            if not self.scheduler.is_alive or num_silent >= _NUM_SILENT:
                broken.add(("scheduler", 0))
            for replica, each in enumerate(load.replicas if load is not None else ()):
                if each.state == pb.ReplicaLoad.LOST:
                    broken.add(("worker", replica))
            for part in sorted(broken, reverse=True):  # workers first
                if part not in busy and part not in self._repairs:
                    if part[0] == "worker":
                        self._spawning.add(part[1])
                    self._repairs[part] = asyncio.create_task(self._repair(part, stub))

    def _has_died(self, replica: int) -> bool:
        return any(not process.is_alive for process in self.processes(replica))

    async def _repair(self, part: tuple[str, int], stub: Any) -> None:
        is_retry = False
        try:
            while True:
                try:
                    await (self._new_workers(part[1], stub) if part[0] == "worker" else self._new_scheduler(is_retry))
                    return
                except (grpc.aio.AioRpcError, WorkerError, BringUpError, RuntimeError):
                    await asyncio.sleep(_RETRY_S)
                    is_retry = True
        finally:
            del self._repairs[part]
            self._spawning.discard(part[1] if part[0] == "worker" else -1)

    async def _new_workers(self, replica: int, stub: Any) -> None:
        self._spawning.add(replica)
        await asyncio.sleep(self.rng.uniform(0.2, 2.0))
        await self._start_workers(replica)
        self._spawning.discard(replica)
        while ("scheduler", 0) in self._repairs:
            await asyncio.sleep(0.01)
        request = pb.ReplaceWorkersRequest(replica=replica, workers=self._addresses[replica])
        await stub.ReplaceWorkers(request, wait_for_ready=True)

    async def _new_scheduler(self, is_retry: bool) -> None:
        self.scheduler.kill()
        while self._spawning:
            await asyncio.sleep(0.01)
        if is_retry:
            broken = [replica for replica in range(len(self.workers)) if self._has_died(replica)]
            await self._start_workers((broken or [0])[0])
        await asyncio.sleep(self.rng.uniform(0.2, 1.0))
        self.scheduler = Process("scheduler")
        self.engine = None
        try:
            await self.scheduler.spawn(self._start_engine(takes_over=True))
        except BaseException:
            self.scheduler.kill()
            raise
