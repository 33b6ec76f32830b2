"""A worker of the simulated cluster: `FakeWorker` behind links, which does one thing at a time and keeps the real rule
for epochs, whose ranks enter collectives together, with faults."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from manta.cluster.link_listener import LinkListener
from manta.cluster.links import Link
from manta.protos import worker_pb2 as pb
from manta.protos import worker_pb2_grpc
from manta.workers.epochs import EpochGuard, RefusedPlanError
from tests.support.fake_worker_server import FakeDevice, FakeWorker
from tests.support.simulation.loop import Process
from tests.support.simulation.net import Network
from tests.support.simulation.rpc import RpcServer


class Mesh:
    """The ranks of one replica: the n-th collective of each has to be the same one, and waits for all of them."""

    def __init__(self, num_ranks: int) -> None:
        self.wrong: list[str] = []
        self._num_ranks = num_ranks
        self._entered: defaultdict[int, int] = defaultdict(int)  # by rank
        self._keys: list[bytes] = []
        self._full: list[asyncio.Event] = []
        self._present: list[int] = []

    async def meet(self, rank: int, key: bytes) -> None:
        number = self._entered[rank]
        self._entered[rank] += 1
        if number == len(self._keys):
            self._keys.append(key)
            self._present.append(0)
            self._full.append(asyncio.Event())
        elif self._keys[number] != key:
            self.wrong.append(f"rank {rank} enters another collective as number {number} than others")
        self._present[number] += 1
        if self._present[number] == self._num_ranks:
            self._full[number].set()
        await self._full[number].wait()


@dataclass
class Faults:
    """What happens to the worker next, each once: the test sets it."""

    fails: bool = False  # a step reports an error
    answers_late_s: float = 0.0
    answers_twice: bool = False
    answers_old_epoch: bool = False
    dies: str = ""  # "before" or "after" a result
    load_s: float = 0.5
    dies_in_load: bool = False
    kill: Callable[[], None] = field(default=lambda: None)


class SimWorker(FakeWorker):
    """One rank in a process of its own. Build it with `await SimWorker.start(...)`, in that process."""

    def __init__(self, process: Process, num_blocks: int, step_s: float, mesh: Mesh, rank: int) -> None:
        super().__init__(num_blocks, step_s)
        self.process = process
        self.faults = Faults()
        self._mesh = mesh
        self._rank = rank
        self._guard = EpochGuard()
        self._work: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()  # what the compute thread does

    @classmethod
    async def start(cls, network: Network, process: Process, *args: Any) -> tuple["SimWorker", str]:
        worker = cls(process, *args)
        worker.links = LinkListener("127.0.0.1", worker._serve)  # type: ignore[assignment]
        worker.links.start()
        server = RpcServer(network)
        worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        process.spawn(worker._compute())
        return worker, f"127.0.0.1:{port}"

    async def _compute(self) -> None:
        while True:
            await (await self._work.get())()

    async def Load(self, request: pb.LoadRequest, context: Any) -> pb.LoadResponse:
        if self.load is None:
            await asyncio.sleep(self.faults.load_s)
            if self.faults.dies_in_load:
                self.faults.kill()
                await asyncio.sleep(1)
        return await super().Load(request, context)

    async def Start(self, request: pb.StartRequest, context: Any) -> pb.StartResponse:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def start() -> None:
            assert self._config is not None
            self._last, self._guard = self._guard.position, EpochGuard(after=self._guard.position)
            self.started_blocks = request.num_blocks
            self.device = FakeDevice(request.num_blocks, self._config.block_size)
            if not done.done():
                done.set_result(None)

        self._work.put_nowait(start)
        await done
        return pb.StartResponse(last_epoch=self._last[0], last_step=self._last[1])

    def _admits_blocks(self, epoch: int) -> bool:
        return self._guard.admits_blocks(epoch)

    async def _serve(self, link: Link) -> None:
        guard = self._guard
        while True:
            plan = pb.StepPlan.FromString(await link.read())

            async def step(plan: pb.StepPlan = plan) -> None:
                await self._do(plan, guard, link)

            self._work.put_nowait(step)

    async def _do(self, plan: pb.StepPlan, guard: EpochGuard, link: Link) -> None:
        faults, result = self.faults, pb.StepResult(epoch=plan.epoch, step=plan.step)
        try:
            if guard is not self._guard:
                raise RefusedPlanError("it is of a scheduler that another has replaced")
            guard.admit(plan)
            if faults.fails:
                faults.fails = False
                guard.fail(plan.epoch, "out of memory")
                result.error = "out of memory"
            else:
                await self._mesh.meet(self._rank, plan.SerializeToString())
                result = await self._step(plan)
        except RefusedPlanError as error:
            result.error = str(error)
        if faults.dies == "before":
            faults.kill()
        if faults.answers_late_s:
            late_s, faults.answers_late_s = faults.answers_late_s, 0.0
            await asyncio.sleep(late_s)
        if not (result.error or self._is_output()):
            return
        link.write(result.SerializeToString())
        if faults.answers_twice:
            faults.answers_twice = False
            link.write(result.SerializeToString())
        if faults.answers_old_epoch and plan.epoch > 1:
            faults.answers_old_epoch = False
            link.write(pb.StepResult(epoch=plan.epoch - 1, step=plan.step, tokens=result.tokens).SerializeToString())
        if faults.dies == "after":
            faults.kill()
