"""The step loop of one replica: plan while credits last, send, apply what comes back, plan again, publish."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count

from manta.cluster.engine.codec import Reply, encode_plan
from manta.cluster.engine.epoch import EpochStreams
from manta.cluster.engine.metrics import ReplicaMetrics
from manta.cluster.engine.workers import SILENT_S, WorkerError, WorkerGroup
from manta.scheduler.scheduler import Scheduler
from manta.scheduler.types import Events, WrongResultError

logger = logging.getLogger(__name__)

_HEALTHY_STEPS = 100  # an epoch with fewer counts as short
_MAX_UNSETTLED = 64
_LOOK_AGAIN_S = 0.05
_numbers = count()


@dataclass(frozen=True, slots=True)
class Deadlines:
    """When the loop gives up. A step may compile kernels or swap on a loaded CPU host: generous, but not forever."""

    step_s: float = 60.0
    step_per_token_s: float = 0.1
    probe_s: float = 3.0  # for a worker to show that it is alive after an epoch ended
    silent_probe_s: float = 0.5  # for one that was silent for seconds
    check_every_s: float = 1.0
    max_failed_epochs: int = 3  # in a row, each short


@dataclass(slots=True)
class _SentStep:
    step: int
    num_tokens: int
    num_decodes: int
    num_bytes: int
    sent_s: float
    follows_work: bool  # the replica had work before this step: its idle time counts


@dataclass(slots=True)
class _DoneStep:
    sent: _SentStep
    reply: Reply
    received_s: float
    cpu_s: float  # from the reply's arrival until everyone had been told


class ReplicaLoop:
    """Owns the epochs of one replica. `run` returns when the replica is lost, with the reason in `lost_reason`."""

    def __init__(
        self,
        index: int,
        group: WorkerGroup,
        scheduler: Scheduler,
        metrics: ReplicaMetrics,
        publish: Callable[[Events, int], None],
        deadlines: Deadlines,
        observe: Callable[[int, int, float], None] = lambda *_: None,
    ) -> None:
        """observe: told of every step how many tokens of prompts and decode rows it had, and the device's seconds."""
        self.index = index
        self.group = group
        self.metrics = metrics
        self.lost_reason: str | None = None
        self.trouble: str | None = None  # why the last epoch ended, until a step comes back
        self._scheduler = scheduler
        self._publish = publish
        self._deadlines = deadlines
        self._observe = observe
        self._failure: asyncio.Future[None] | None = None  # of the epoch: what others found to be wrong with it
        self._in_flight: deque[_SentStep] = deque()
        self._wake = asyncio.Event()
        self._had_work = False
        self._last_reply_s = 0.0
        self._last_settled_s = 0.0
        self._workers_number = next(_numbers)
        self._failed_epochs = 0
        self._num_steps = 0  # done in this epoch
        self._unsettled: list[_DoneStep] = []

    def wake(self) -> None:
        """There may be something to plan."""
        self._wake.set()

    def fail(self, error: WorkerError) -> None:
        """Ends the epoch: somebody else has found that a rank cannot be reached."""
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)

    async def run(self, on_requeue: Callable[[], None], meet_again: Callable[[], Awaitable[None]]) -> None:
        """Serves epoch after epoch; `on_requeue` is called when sequences of this replica are back in the queue, where
        other replicas can take them, and when these wait for what this one leaves. `meet_again` brings ranks together
        that are out of step; raises WorkerError."""
        while self.lost_reason is None:
            try:
                await self._run_epoch(on_requeue)
            except WorkerError as error:
                logger.warning("replica %d: epoch ended: %s", self.index, error)
                self.trouble = str(error)
                num_steps = self._num_sent_before_silence() if error.was_silent else None
                events = self._scheduler.fail_replica(self.index, error.reason, self._workers_number, num_steps)
                if any(finished.error for finished in events.finished):  # it was not the workers' fault
                    self._failed_epochs, self._num_steps = -1, 0
                self._publish(events, self.index)
                self.metrics.failovers.value += 1
                self.metrics.awaits_recovery = True
                on_requeue()
                self.lost_reason = await self._why_lost(error, meet_again)

    def _num_sent_before_silence(self) -> int:
        """Later ones are not why nothing is heard of the workers: these may be cut off, and all of them at once."""
        began_s = time.perf_counter() - SILENT_S
        return sum(sent.sent_s < began_s for sent in self._in_flight)

    async def _why_lost(self, error: WorkerError, meet_again: Callable[[], Awaitable[None]]) -> str | None:
        """None when another epoch is worth trying."""
        if self._num_steps >= _HEALTHY_STEPS:
            self._failed_epochs = 0
        self._failed_epochs += 1
        if self._failed_epochs >= self._deadlines.max_failed_epochs:
            return f"{error} ({self._failed_epochs} times in a row)"
        try:
            await self.group.check(self._deadlines.silent_probe_s if error.was_silent else self._deadlines.probe_s)
        except WorkerError as dead:
            return str(dead)
        if len(self.group.addresses) > 1:
            # Some ranks are in the midst of a collective that others will never enter. In another epoch they would
            # add up what does not belong together, and nobody would notice.
            try:
                await meet_again()
            except WorkerError as again:
                return str(again)
        return None

    async def _run_epoch(self, on_requeue: Callable[[], None]) -> None:
        """Runs until a WorkerError."""
        self._in_flight.clear()
        self._num_steps = 0
        self._had_work = False
        self._wake.set()
        streams = await EpochStreams.open(self.group)
        self._scheduler.open_replica(self.index)
        self._failure = asyncio.get_running_loop().create_future()
        parts = [
            self._plan_when_woken(streams, on_requeue),
            self._receive_results(streams, on_requeue),
            self._watch_deadline(),
            self._await_failure(self._failure),
            *(streams.watch(rank) for rank in range(len(self.group.addresses)) if rank != self.group.output_rank),
        ]
        tasks = [asyncio.create_task(part) for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            streams.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    async def _plan_when_woken(self, streams: EpochStreams, on_requeue: Callable[[], None]) -> None:
        timer: asyncio.TimerHandle | None = None
        while True:
            await self._wake.wait()
            self._wake.clear()
            self._send_plans(streams, on_requeue)
            if self.index in self._scheduler.idle_replicas:
                if timer is not None:
                    timer.cancel()
                timer = asyncio.get_running_loop().call_later(_LOOK_AGAIN_S, self.wake)

    def _send_plans(self, streams: EpochStreams, on_requeue: Callable[[], None]) -> None:
        """While credits last and there is something to run. Does not block."""
        counters = self._scheduler.counters
        num_preemptions = counters.num_preemptions
        while (plan := self._scheduler.plan(self.index)) is not None:
            message = encode_plan(plan)
            streams.send(message)
            sent_s = time.perf_counter()
            sent = _SentStep(plan.step, plan.num_tokens, plan.num_decodes, len(message), sent_s, self._had_work)
            self._in_flight.append(sent)
            self._had_work = True
            if plan.adds:  # requests that started
                self._publish(self._scheduler.take_events(), self.index)
        if not self._in_flight:
            self._had_work = False
        self.metrics.preemptions.value += counters.num_preemptions - num_preemptions
        if counters.num_preemptions > num_preemptions:
            on_requeue()

    async def _receive_results(self, streams: EpochStreams, on_requeue: Callable[[], None]) -> None:
        while True:
            reply = await streams.receive()
            received_s, cpu_start_s = time.perf_counter(), time.thread_time()
            try:
                events = self._scheduler.apply(reply.result, self.index)
            except WrongResultError as error:
                rank = self.group.output_rank
                raise WorkerError(rank, self.group.addresses[rank], str(error)) from None
            if self._scheduler.num_in_flight(self.index) == len(self._in_flight):  # it is of an earlier epoch
                self._publish(events, self.index)
                continue
            sent = self._in_flight.popleft()
            self._send_plans(streams, on_requeue)  # first of all: a device may be waiting
            if self._scheduler.idle_replicas:
                on_requeue()
            self._publish(events, self.index)
            self._num_steps += 1
            self.trouble = None
            if self.metrics.awaits_recovery:
                self.metrics.awaits_recovery = False
                self.metrics.recoveries.value += 1
            self._last_reply_s = received_s
            self._unsettled.append(_DoneStep(sent, reply, received_s, time.thread_time() - cpu_start_s))
            if len(self._unsettled) >= _MAX_UNSETTLED:
                self.settle()

    def settle(self) -> None:
        """Brings the metrics up to date. For many steps at once it costs a fraction of what it would in each."""
        metrics, done, self._unsettled = self.metrics, self._unsettled, []
        for step in done:
            sent, reply = step.sent, step.reply
            spent_s = step.received_s - sent.sent_s - (reply.device_us + reply.queue_us) * 1e-6
            metrics.step_s.observe(step.received_s - max(sent.sent_s, self._last_settled_s))
            metrics.dispatch_latency_s.observe(max(spent_s, 0.0))
            self._observe(sent.num_tokens - sent.num_decodes, sent.num_decodes, reply.device_us * 1e-6)
            metrics.observe_device(reply.device_us, reply.idle_us if sent.follows_work else 0)
            metrics.scheduler_cpu_s.observe(step.cpu_s)
            metrics.plan_bytes.observe(sent.num_bytes)
            self._last_settled_s = step.received_s

    @staticmethod
    async def _await_failure(failure: "asyncio.Future[None]") -> None:
        await failure

    async def _watch_deadline(self) -> None:
        """A stopped or deadlocked worker keeps its stream open; only time tells."""
        deadlines = self._deadlines
        while True:
            await asyncio.sleep(deadlines.check_every_s)
            if not self._in_flight:
                continue
            oldest = self._in_flight[0]
            allowed_s = deadlines.step_s + deadlines.step_per_token_s * oldest.num_tokens
            waited_s = time.perf_counter() - max(oldest.sent_s, self._last_reply_s)
            if waited_s > allowed_s:
                rank = self.group.output_rank
                reason = f"step {oldest.step} ({oldest.num_tokens} tokens) has not come back within {allowed_s:.0f} s"
                raise WorkerError(rank, self.group.addresses[rank], reason)
