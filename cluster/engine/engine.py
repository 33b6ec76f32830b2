"""The engine: a scheduler, the step loops of its replicas, and the frontends' requests."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from manta.cluster.engine.admission import build_request, build_samples, build_search
from manta.cluster.engine.block_tables import block_tables
from manta.cluster.engine.bringup import BringUpError, Deployment
from manta.cluster.engine.frontend import MAX_PENDING_BYTES, Frontend
from manta.cluster.engine.grammars import GrammarGate
from manta.cluster.engine.metrics import ReplicaMetrics
from manta.cluster.engine.mover import Mover
from manta.cluster.engine.publisher import Publisher
from manta.cluster.engine.replica import Deadlines, ReplicaLoop
from manta.cluster.engine.report import Reporter
from manta.cluster.engine.revival import meet_again, replace_workers
from manta.cluster.engine.workers import WorkerError, WorkerGroup
from manta.configs.model import ModelSpec
from manta.configs.schema import ServeConfig
from manta.configs.tenant_weights import read_weights
from manta.protos import engine_pb2 as pb
from manta.scheduler.scheduler import Scheduler
from manta.scheduler.types import Events, QueueFullError

logger = logging.getLogger(__name__)

MAX_SEQUENCES = 1024  # of one submit
_ABSENT = "it is not needed now"
_MIN_RETRY_AFTER_S = 1.0
_MAX_RETRY_AFTER_S = 60.0


class Engine:
    """Everything runs on one event loop; no method blocks. `frontend` arguments come from `open_frontend`."""

    def __init__(
        self,
        config: ServeConfig,
        spec: ModelSpec,
        deployment: Deployment,
        deadlines: Deadlines | None = None,
        on_replica_lost: Callable[[int, str], None] | None = None,
        max_pending_bytes: int = MAX_PENDING_BYTES,
        replaces_workers: bool = False,
    ) -> None:
        """replaces_workers: somebody will call `replace_workers` for a lost replica, or `give_up`; requests wait."""
        self.config = config
        self.deployment = deployment
        self.scheduler = Scheduler(
            deployment.capacities,
            policy=config.scheduling_policy,
            tenant_weights=read_weights(config.tenant_weights),
            enable_prefix_caching=config.enable_prefix_caching,
            enable_chunked_prefill=config.enable_chunked_prefill,
            max_num_queued_reqs=config.max_num_queued_reqs,
            max_num_queued_tokens=config.max_num_queued_tokens,
        )
        self._spec = spec
        self._on_replica_lost = on_replica_lost
        self._metrics = [ReplicaMetrics() for _ in deployment.groups]
        self._publisher = Publisher(self._metrics, max_pending_bytes=max_pending_bytes)
        self._deadlines = deadlines or Deadlines()
        self._replaces_workers = replaces_workers
        self._mover = Mover(self.scheduler, deployment, self._wake, lambda index, error: self._loops[index].fail(error))
        self._loops = [self._new_loop(index) for index in range(len(deployment.groups))]
        for index, loop in enumerate(self._loops):
            loop.lost_reason = deployment.lost.get(index) if loop.group.addresses else _ABSENT
            if loop.lost_reason is not None:
                self.scheduler.close_replica(index)
        self._given_up: dict[int, str] = {}  # replicas that nobody will bring back, and why
        self._reporter = Reporter(
            config, deployment, self.scheduler, self._publisher, self._metrics, self._loops, self._given_up
        )
        self._grammars = GrammarGate(deployment.groups)
        self._tasks: dict[int, asyncio.Task[None]] = {}  # by replica
        self._draining = False
        self._all_lost = asyncio.Event()

    def start(self) -> None:
        """Starts the step loops on the running event loop."""
        for loop in self._loops:
            if loop.lost_reason is None:
                self._tasks[loop.index] = asyncio.create_task(self._serve(loop))

    async def replace_workers(self, index: int, addresses: list[str]) -> None:
        """Gives a replica new workers and returns when it serves again; what it had runs on meanwhile, where there is
        room. Raises WorkerError or BringUpError, after which the replica is lost, IndexError if there is no such one.
        """
        loop = self._loops[index]
        await self._end_loop(loop, "its workers are replaced")
        try:
            await replace_workers(self.config, self.deployment, index, addresses)
        except (WorkerError, BringUpError) as error:
            loop.lost_reason = str(error)
            raise
        self._given_up.pop(index, None)
        self._loops[index] = self._new_loop(index)
        self._tasks[index] = asyncio.create_task(self._serve(self._loops[index]))
        logger.info("replica %d has new workers", index)

    async def retire(self, index: int) -> None:
        """The replica is not needed: what it has goes to others. Raises IndexError if there is no such one."""
        if self._loops[index].lost_reason is None:
            await self._mover.evacuate(index)
        await self._end_loop(self._loops[index], _ABSENT)
        self.scheduler.give_up_replica(index)
        group = self.deployment.groups[index]
        self.deployment.groups[index] = WorkerGroup([], group.output_rank)
        self._loops[index] = self._new_loop(index)
        self._loops[index].lost_reason = _ABSENT
        await group.close()

    async def _end_loop(self, loop: ReplicaLoop, reason: str) -> None:
        """What it has is back in the queue then."""
        if loop.lost_reason is None:
            self._tasks[loop.index].cancel()
            await asyncio.gather(self._tasks[loop.index], return_exceptions=True)
            self.scheduler.close_replica(loop.index)
            self._wake()
        loop.lost_reason = reason

    def give_up(self, index: int, reason: str) -> None:
        """Nobody will bring the lost replica back. When that is so for all, requests end with an error."""
        loop = self._loops[index]
        loop.lost_reason = loop.lost_reason or reason
        self._given_up[index] = reason
        self.scheduler.give_up_replica(index)
        if len(self._given_up) == len(self._loops):
            for request_id in self._publisher.open_request_ids():
                self.scheduler.abort(request_id)
            self._publisher.fail_all(f"no replica is left: {reason}")
            self._all_lost.set()

    def _new_loop(self, index: int) -> ReplicaLoop:
        group, metrics = self.deployment.groups[index], self._metrics[index]
        meter = self._mover.meter
        return ReplicaLoop(index, group, self.scheduler, metrics, self._publish, self._deadlines, meter.observe_step)

    def _publish(self, events: Events, index: int) -> None:
        """What a step of a replica, or a plan, has brought."""
        self._publisher.publish(events, index)
        self._mover.look(index)

    async def stop(self) -> None:
        """Ends the step loops and the channels; open requests end with an error, and new ones are refused."""
        self._draining = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self._mover.close()
        await self._grammars.close()
        self._publisher.fail_all("the engine is shutting down")
        await self.deployment.close()

    async def lost(self) -> str:
        """Returns the reason once no replica is left: nothing can be served from then on."""
        await self._all_lost.wait()
        return self._why_all_lost()

    def _why_all_lost(self) -> str:
        return next(iter(self._given_up.values()))

    def open_frontend(self) -> Frontend:
        return self._publisher.open_frontend()

    def close_frontend(self, frontend: Frontend) -> None:
        """Aborts its unfinished requests."""
        self.abort(frontend, list(frontend.requests))
        self._publisher.close_frontend(frontend)

    def submit(self, frontend: Frontend, submit: pb.Submit) -> None:
        """Queues a request, or tells the frontend why not. Raises ValueError when the handle is in use."""
        if submit.num_sequences > 1 or submit.HasField("beams"):
            self._submit_group(frontend, submit)
            return
        request_id = self._publisher.open_request(frontend, submit.handle, submit.tenant)
        refused = self._refusal()
        if refused is None and submit.sampling.HasField("grammar"):
            ready = partial(self._enqueue, frontend, submit, request_id)
            grammar = submit.sampling.grammar
            refused = self._grammars.hold(request_id, grammar, ready, resubmitted=submit.resubmitted)
            if refused is None:
                return
        self._enqueue(frontend, submit, request_id, refused)

    def _enqueue(self, frontend: Frontend, submit: pb.Submit, request_id: int, refused: pb.Refused | None) -> None:
        """Gives an open request to the scheduler unless it is refused already, or has ended while it was held."""
        if frontend.requests.get(submit.handle) != request_id:
            return
        self._give(frontend, submit, [request_id], refused)

    def _submit_group(self, frontend: Frontend, submit: pb.Submit) -> None:
        """As `submit`, for several sequences of one prompt: all are queued, or none."""
        refused = self._refusal()
        num_sequences = max(submit.num_sequences, 1)
        if num_sequences > MAX_SEQUENCES:
            num_sequences = 1
            message = f"{submit.num_sequences} sequences of one prompt are more than {MAX_SEQUENCES}"
            refused = pb.Refused(code=pb.Refused.INVALID, message=message)
        elif submit.sampling.HasField("grammar") or submit.output_tokens or submit.HasField("pooling"):
            message = "sequences that follow a grammar, have output already or become vectors are submitted one by one"
            refused = pb.Refused(code=pb.Refused.INVALID, message=message)
        request_ids = []
        try:
            for handle in range(submit.handle, submit.handle + num_sequences):
                request_id = self._publisher.open_request(frontend, handle, submit.tenant)
                request_ids.append(request_id)
        except ValueError:
            for handle in range(submit.handle, submit.handle + len(request_ids)):
                self._publisher.close_request(frontend, handle)
            raise
        self._give(frontend, submit, request_ids, refused)

    def _give(self, frontend: Frontend, submit: pb.Submit, request_ids: list[int], refused: pb.Refused | None) -> None:
        """Gives open requests, whose handles follow each other, to the scheduler unless they are refused already."""
        publisher = self._publisher
        if refused is None:
            try:
                self._add(submit, request_ids)
                publisher.publish(self.scheduler.take_events(), 0)
            except QueueFullError as error:
                retry_after_s = min(max(publisher.recent_queue_s, _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S)
                refused = pb.Refused(code=pb.Refused.QUEUE_FULL, message=str(error), retry_after_s=retry_after_s)
            except ValueError as error:  # RefusedError, or columns that are no whole number of tokens
                refused = pb.Refused(code=pb.Refused.INVALID, message=str(error))
        if refused is None:
            self._wake()
            return
        for handle in range(submit.handle, submit.handle + len(request_ids)):
            told = pb.Refused()
            told.CopyFrom(refused)
            told.handle = handle
            publisher.close_request(frontend, handle)
            frontend.add_refused(told)

    def _add(self, submit: pb.Submit, request_ids: list[int]) -> None:
        first = build_request(submit, request_ids[0], self._spec, self._publisher.clock())
        if submit.HasField("beams"):
            search = build_search(first, request_ids[1:], submit.beams, self._spec.vocab_size)
            self.scheduler.add_search(*search, resubmitted=submit.resubmitted)
        elif len(request_ids) > 1:
            self.scheduler.add_group(build_samples(first, request_ids[1:]))
        else:
            self.scheduler.add(first, resubmitted=submit.resubmitted)

    def abort(self, frontend: Frontend, handles: list[int]) -> None:
        """Ends requests with reason "abort"; those that have ended already are ignored."""
        for handle in handles:
            request_id = frontend.requests.get(handle)
            if request_id is None:
                continue
            if self._grammars.drop(request_id):
                self._metrics[0].finished["abort"] += 1
                frontend.add_finished(pb.Finished(handle=handle, reason="abort"))
                self._publisher.close_request(frontend, handle)
            else:
                self._publisher.publish(self.scheduler.abort(request_id), 0)
        self._wake()

    async def drain(self, timeout_s: float) -> bool:
        """Refuses new requests from now on; returns whether all others have ended within `timeout_s`."""
        self._draining = True
        try:
            await asyncio.wait_for(self._publisher.idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def info(self) -> pb.InfoResponse:
        return self._reporter.info()

    def load(self) -> pb.LoadResponse:
        return self._reporter.load(self._draining, self._grammars.num_held)

    def block_tables(self) -> pb.BlockTablesResponse:
        """Every sequence's block table; counts are sums over the replicas."""
        return block_tables(self.scheduler.snapshot())

    def metrics_text(self) -> bytes:
        """Prometheus exposition format."""
        return self._reporter.metrics_text()

    async def _serve(self, loop: ReplicaLoop) -> None:
        """One replica's life."""
        try:
            await loop.run(self._wake, partial(meet_again, self.config, self.deployment, loop.index))
        except Exception as error:
            logger.exception("the step loop of replica %d failed", loop.index)
            self._give_up_all(f"internal error: {error!r}")
            return
        reason = str(loop.lost_reason)
        logger.error("replica %d is lost: %s", loop.index, reason)
        if self._on_replica_lost is not None:
            self._on_replica_lost(loop.index, reason)
        if not self._replaces_workers:
            self.give_up(loop.index, reason)

    def _give_up_all(self, reason: str) -> None:
        """After a bug nothing that the scheduler holds can be trusted, and no request may hang for it."""
        for loop in self._loops:
            loop.lost_reason = loop.lost_reason or reason
            self._given_up.setdefault(loop.index, reason)
        for task in self._tasks.values():
            if task is not asyncio.current_task():
                task.cancel()
        self._publisher.fail_all(reason)
        self._all_lost.set()

    def _refusal(self) -> pb.Refused | None:
        if self._draining:
            return pb.Refused(code=pb.Refused.DRAINING, message="the engine is shutting down")
        if len(self._given_up) == len(self._loops):
            message = f"no replica is left: {self._why_all_lost()}"
            return pb.Refused(code=pb.Refused.UNAVAILABLE, message=message)
        return None

    def _wake(self) -> None:
        """Wakes the emptiest replica first: of equally good ones the first to plan takes what is waiting."""
        for loop in sorted(self._loops, key=lambda loop: -self.scheduler.num_free_blocks(loop.index)):
            loop.wake()
