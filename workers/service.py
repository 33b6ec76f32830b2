"""The Worker service of `protos/worker.proto`: its calls in order, its errors as status codes.

Threads: gRPC's handle the calls, each Run stream or link has one that reads plans, and one compute thread does all
work.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from manta.configs.schema import ServeConfig
from manta.protos import worker_pb2 as pb
from manta.protos.worker_pb2_grpc import WorkerServicer
from manta.workers.block_transfer import BlockTransfers
from manta.workers.compute import ComputeThread
from manta.workers.epochs import EpochGuard, RefusedPlanError
from manta.workers.failures import OrderError, reason_of, status_of
from manta.workers.lease import Lease
from manta.workers.links import LinkServer

if TYPE_CHECKING:  # torch takes a second to import; the service can be reached before
    from manta.workers.block_bytes import BlockBytes
    from manta.workers.rank import LoadedRank, Placement
    from manta.workers.runner import Runner, Step

logger = logging.getLogger(__name__)

MAX_UINT32 = 2**32 - 1
_LET_GO_TIMEOUT_S = 10.0
_STEP_TIMEOUT_S = 10.0  # of a copy for a step that is under way
Answers = SimpleQueue[Callable[[], pb.StepResult] | None]  # each waits for its step; None ends the stream


class WorkerService(WorkerServicer):
    """One rank behind its gRPC calls. These, and links, hold the lease, and end when the other side does."""

    def __init__(self, host: str, lease: Lease) -> None:
        self._lease = lease
        self._host = host
        self._compute = ComputeThread()
        self._lock = threading.Lock()  # guards what Describe and Load decide once
        self._store: tuple[Any, int] | None = None  # the rendezvous store and its port
        self._request: pb.LoadRequest | None = None  # of the Load that began
        self._name = "a rank not loaded yet"
        self._loaded: LoadedRank | None = None
        self._runner: Runner | None = None
        self._num_blocks = 0  # of the runner
        self._guard = EpochGuard()
        self._transfers = BlockTransfers(lambda: self._guard, self._finish_steps)
        self._links = LinkServer(host, self.run)
        self._links.start()

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeResponse:
        """Answers while the compute thread is busy, so it also tells that the process lives."""
        from manta.workers.mesh import open_store
        from manta.workers.rank import device_name

        with self._lease.call(), self._lock:
            if request.open_rendezvous and self._store is None:
                self._store = open_store()
            port = self._store[1] if self._store else 0
        return pb.DescribeResponse(
            host=self._host,
            rendezvous_port=port,
            device=device_name(),
            pid=os.getpid(),
            link_port=self._links.port,
            link_socket=self._links.socket_name,
            link_key=self._links.key,
        )

    def Load(self, request: pb.LoadRequest, context: grpc.ServicerContext) -> pb.LoadResponse:
        try:
            with self._lease.call():
                loaded = self._load(request)
        except Exception as error:
            self._abort(context, error)
            raise
        return pb.LoadResponse(
            num_blocks=self._num_blocks or loaded.num_blocks,
            weight_bytes=loaded.weight_bytes,
            bytes_per_block=loaded.bytes_per_block,
            load_s=loaded.load_s,
            profile_s=loaded.profile_s,
        )

    def Start(self, request: pb.StartRequest, context: grpc.ServicerContext) -> pb.StartResponse:
        began_s = time.perf_counter()
        try:
            with self._lease.call():  # warming up may take minutes
                epoch, step = self._compute.call(partial(self._start, request.num_blocks))
        except Exception as error:
            self._abort(context, error)
            raise
        return pb.StartResponse(warmup_s=time.perf_counter() - began_s, last_epoch=epoch, last_step=step)

    def Compile(self, request: pb.CompileRequest, context: grpc.ServicerContext) -> pb.CompileResponse:
        from manta.workers.grammars import GrammarError

        runner = self._runner
        if runner is None or runner.grammars is None:
            self._abort(context, OrderError("Compile came before Start, or to a rank that does not sample"))
        else:
            try:
                runner.grammars.compile(request.grammar)
            except GrammarError as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return pb.CompileResponse()

    def ImportBlocks(self, request: pb.ImportBlocksRequest, context: grpc.ServicerContext) -> pb.ImportBlocksResponse:
        try:
            with self._lease.call():
                return self._transfers.fetch(request, self._blocks())
        except Exception as error:
            self._abort(context, error)
            raise

    def ExportBlocks(self, request: pb.ExportBlocksRequest, context: grpc.ServicerContext) -> Iterator[pb.BlockChunk]:
        try:
            with self._lease.call():
                yield from self._transfers.export(request, self._blocks())
        except Exception as error:
            self._abort(context, error)
            raise

    def _finish_steps(self) -> None:
        """Waits for the compute thread and its device. Raises TimeoutError."""
        from manta.workers.rank import wait_for_device

        loaded = self._loaded
        if loaded is not None:
            self._compute.call(partial(wait_for_device, loaded), _STEP_TIMEOUT_S)

    def _blocks(self) -> "BlockBytes":
        if self._runner is None or self._runner.blocks is None:
            raise OrderError("blocks were asked for before Start")
        return self._runner.blocks

    def Run(self, request_iterator: Iterator[pb.StepPlan], context: grpc.ServicerContext) -> Iterator[pb.StepResult]:
        try:
            yield from self.run(request_iterator)
        except OrderError as error:
            self._abort(context, error)

    def run(self, plans: Iterator[pb.StepPlan]) -> Iterator[pb.StepResult]:
        """Runs plans until they end. Those received by then are still computed: this rank's peers may be in the midst
        of them. Raises OrderError."""
        runner = self._runner
        if runner is None:
            raise OrderError("Run came before Start")
        answers: Answers = SimpleQueue()
        args = (runner, self._guard, plans, answers)
        with self._lease.call():
            threading.Thread(target=self._read, args=args, name="plans", daemon=True).start()
            while (answer := answers.get()) is not None:
                yield answer()

    def model_folder(self) -> Path | None:
        """Where the loaded model's files are, if this host has them."""
        return self._loaded.folder if self._loaded is not None else None

    def close(self) -> None:
        """Ends the links, and the compute thread after what it is doing."""
        self._lease.end()
        self._links.stop()
        self._transfers.close()
        self._compute.stop()

    def _load(self, request: pb.LoadRequest) -> "LoadedRank":
        from manta.workers.rank import load_rank

        with self._lock:
            last, self._request = self._request, self._request or request
            if last is not None:
                if self._loaded is None or _placement(request) != _placement(last):
                    raise OrderError("Load came a second time, for something else; a worker loads once")
                if request.meeting in ("", last.meeting):
                    return self._loaded
                self._request = request
        if last is not None and self._loaded is not None:
            return self._join_again(self._loaded, request)
        try:
            self._name = f"tp rank {request.tp_rank} of stage {request.pp_rank}"
            config = ServeConfig.model_validate_json(request.config_json)
            self._lease.length_s = config.worker_lease
            placement = self._place(request)
            self._loaded = self._compute.call(partial(load_rank, config, placement, tuple(request.peers)))
        except Exception:
            self._request = None  # the caller may mend its request and try again
            raise
        return self._loaded

    def _place(self, request: pb.LoadRequest) -> "Placement":
        from manta.workers.rank import Placement

        return Placement(
            tp_rank=request.tp_rank,
            pp_rank=request.pp_rank,
            num_workers_on_host=request.num_workers_on_host,
            rendezvous_host=request.rendezvous_host,
            rendezvous_port=request.rendezvous_port,
            store=self._store[0] if self._store else None,
            meeting=request.meeting,
        )

    def _join_again(self, loaded: "LoadedRank", request: pb.LoadRequest) -> "LoadedRank":
        """Leaves the other ranks, in whatever it does with them, and joins those of the request. Raises MeshError."""
        from manta.workers.collectives import MeshError
        from manta.workers.rank import join_again

        loaded.mesh.destroy()  # what the compute thread waits for fails
        self._compute.when_idle(lambda: False)
        try:
            self._compute.call(partial(self._let_go, loaded), _LET_GO_TIMEOUT_S)
        except TimeoutError:
            raise MeshError(f"the step under way did not end within {_LET_GO_TIMEOUT_S:g} s") from None
        self._loaded = self._compute.call(partial(join_again, loaded, self._place(request)))
        logger.info("%s has joined its replica again, with the weights it had", self._name)
        return self._loaded

    def _let_go(self, loaded: "LoadedRank") -> None:
        """Forgets the runner: what it has of the groups that are gone is worth nothing."""
        from manta.workers.rank import let_go

        with self._transfers.writing:
            self._guard = EpochGuard()
        self._runner, self._num_blocks = None, 0
        let_go(loaded)

    def _start(self, num_blocks: int) -> tuple[int, int]:
        """Returns epoch and step of the last plan before."""
        if self._loaded is None:
            raise OrderError("Start came before Load")
        position = self._guard.position
        if self._runner is None:
            self._runner = self._loaded.start(num_blocks)
            self._num_blocks = num_blocks
            self._compute.when_idle(self._runner.use_idle_time)
        elif num_blocks != self._num_blocks:
            raise OrderError(f"Start came a second time, for {num_blocks} blocks where there are {self._num_blocks}")
        else:
            with self._transfers.writing:
                self._runner.clear()
                self._guard = EpochGuard(after=position)
        return position

    def _read(self, runner: "Runner", guard: EpochGuard, plans: Iterator[pb.StepPlan], answers: Answers) -> None:
        """Queues the stream's plans as they come, and the end of its answers behind them."""
        try:
            for plan in plans:
                self._compute.post(partial(self._step, runner, guard, plan, time.perf_counter_ns(), answers))
        except (grpc.RpcError, OSError, DecodeError):
            logger.info("%s: the stream of plans broke; waiting for a new one", self._name)
        finally:
            self._compute.post(partial(answers.put, None))

    def _step(self, runner: "Runner", guard: EpochGuard, plan: pb.StepPlan, received_ns: int, answers: Answers) -> None:
        """Does one plan on the compute thread. Whatever goes wrong ends the epoch, not the worker."""
        queue_us = min((time.perf_counter_ns() - received_ns) // 1000, MAX_UINT32)
        try:
            if guard is not self._guard:
                raise RefusedPlanError(f"step {plan.step} is of a scheduler that another has replaced")
            if guard.admit(plan):
                with self._transfers.writing:  # blocks that come for an earlier epoch have come, or will be refused
                    runner.clear()
            step = runner.run(plan)
        except RefusedPlanError as error:
            answers.put(partial(self._error, plan, str(error)))
        except Exception as error:
            logger.exception("%s: epoch %d ends at step %d", self._name, plan.epoch, plan.step)
            failed = self._failed(plan, error)  # here and now: no plan behind this one may run
            answers.put(lambda: failed)
        else:
            if runner.is_output_rank:
                answers.put(partial(self._result, plan, step, queue_us))

    def _result(self, plan: pb.StepPlan, step: "Step", queue_us: int) -> pb.StepResult:
        """Waits for the device. A GPU reports what went wrong in a step only here."""
        try:
            time_ = step.time()
            tokens, logprobs, vectors = step.tokens(), step.logprobs(), step.vectors()
        except Exception as error:
            logger.exception("%s: epoch %d ends at step %d", self._name, plan.epoch, plan.step)
            return self._failed(plan, error)
        return pb.StepResult(
            epoch=plan.epoch,
            step=plan.step,
            tokens=tokens,
            device_us=time_.device_us,
            idle_us=time_.idle_us,
            queue_us=queue_us,
            logprobs=logprobs,
            vectors=vectors,
        )

    def _error(self, plan: pb.StepPlan, reason: str) -> pb.StepResult:
        return pb.StepResult(epoch=plan.epoch, step=plan.step, error=f"{self._name}: {reason}")

    def _failed(self, plan: pb.StepPlan, error: Exception) -> pb.StepResult:
        """Says why the step failed."""
        reason = reason_of(error, plan.step)
        self._guard.fail(plan.epoch, reason)
        return self._error(plan, reason)

    def _abort(self, context: grpc.ServicerContext, error: Exception) -> None:
        """Ends the call (by an exception of gRPC) with the status that fits and a sentence that names the rank."""
        code = status_of(error)
        if code is grpc.StatusCode.INTERNAL:
            logger.error("%s failed", self._name, exc_info=error)
        context.abort(code, f"{self._name}: {error}")


def _placement(request: pb.LoadRequest) -> tuple[str, int, int]:
    return request.config_json, request.tp_rank, request.pp_rank
