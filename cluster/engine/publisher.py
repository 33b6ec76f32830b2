"""Turns what the scheduler says happened into messages for the frontends and observations for the metrics."""

import asyncio
import time
from collections.abc import Callable, Iterable

import numpy as np

from manta.cluster.engine.frontend import MAX_PENDING_BYTES, Frontend
from manta.cluster.engine.metrics import ReplicaMetrics
from manta.cluster.engine.request_table import RequestTable
from manta.cluster.engine.tenant_metrics import TenantMetrics
from manta.cluster.engine.token_times import TokenTimes
from manta.protos import engine_pb2 as pb
from manta.scheduler.types import Events, Finished, Started


class Publisher:
    """Owns the frontends and the table of unfinished requests."""

    def __init__(
        self,
        metrics: list[ReplicaMetrics],
        clock: Callable[[], float] = time.monotonic,
        max_pending_bytes: int = MAX_PENDING_BYTES,
    ) -> None:
        self.clock = clock
        self.recent_queue_s = 0.0  # smoothed time in the queue: what a refused client should wait
        self.num_arrived = 0
        self.idle = asyncio.Event()  # set while no request is open
        self.idle.set()
        self._metrics = metrics
        self._max_pending_bytes = max_pending_bytes
        self._table = RequestTable()
        self.tenants = TenantMetrics()
        self._times = TokenTimes(self._table, self.tenants)
        self._frontends: dict[int, Frontend] = {}
        self._num_frontends = 0
        self._num_open = 0

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return self._num_open

    def open_frontend(self) -> Frontend:
        self._num_frontends += 1
        frontend = Frontend(self._num_frontends, self._max_pending_bytes)
        self._frontends[frontend.number] = frontend
        return frontend

    def close_frontend(self, frontend: Frontend) -> None:
        """Its requests must have ended."""
        frontend.close()
        del self._frontends[frontend.number]

    def open_request(self, frontend: Frontend, handle: int, tenant: str = "") -> int:
        """Returns the new request's id. Raises ValueError when the handle is in use."""
        if handle in frontend.requests:
            raise ValueError(f"handle {handle} is in use: handles are unique within a stream")
        number = self.tenants.number(tenant)
        self.tenants.note_arrival(number)
        request_id = self._table.open(frontend.number, handle, number, self.clock())
        frontend.requests[handle] = request_id
        self._num_open += 1
        self.num_arrived += 1
        self.idle.clear()
        return request_id

    def close_request(self, frontend: Frontend, handle: int) -> None:
        request_id = frontend.requests.pop(handle)
        row = self._table.row(request_id)
        self.tenants.note_end(int(self._table.tenant[row]), has_started=bool(self._table.started_s[row]))
        self._table.close(request_id)
        self._num_open -= 1
        if not self._num_open:
            self.idle.set()

    def publish(self, events: Events, replica: int) -> None:
        """Everything of one call of the scheduler."""
        now_s = self.clock()
        metrics = self._metrics[replica]
        for started in events.started:
            self._publish_started(started, metrics, now_s)
        if events.logprobs:
            self._publish_logprobs(events)
        if len(events.tokens):
            self._publish_tokens(events, metrics, now_s)
        if events.finished:
            self._times.settle()
        for finished in events.finished:
            self._publish_finished(finished, metrics, now_s)

    def fail_all(self, message: str) -> None:
        """Ends every open request with reason "error"."""
        self._times.settle()
        for frontend in self._frontends.values():
            for handle in list(frontend.requests):
                self._metrics[0].finished["error"] += 1
                frontend.add_finished(pb.Finished(handle=handle, reason="error", error=message))
                self.close_request(frontend, handle)

    def settle(self) -> None:
        """Brings the metrics up to date."""
        self._times.settle()

    def open_request_ids(self) -> Iterable[int]:
        return [request_id for frontend in self._frontends.values() for request_id in frontend.requests.values()]

    def _publish_started(self, started: Started, metrics: ReplicaMetrics, now_s: float) -> None:
        table = self._table
        row = table.row(started.request.id)
        queue_s = now_s - float(table.arrival_s[row])
        table.started_s[row] = now_s
        self.recent_queue_s += 0.1 * (queue_s - self.recent_queue_s)
        metrics.queue_s.observe(queue_s)
        num_prompt_tokens = 0 if started.is_follower else len(started.request.prompt)
        self.tenants.note_start(int(table.tenant[row]), num_prompt_tokens, queue_s)
        if not started.is_follower:
            metrics.prompt_tokens.value += len(started.request.prompt)
            metrics.prefix_cache_queries.value += len(started.request.prompt)
            metrics.prefix_cache_hits.value += started.num_cached_tokens
        handle = int(table.handle[row])
        news = pb.Started(handle=handle, num_cached_tokens=started.num_cached_tokens, queue_s=queue_s)
        self._frontends[int(table.frontend[row])].add_started(news)

    def _publish_tokens(self, events: Events, metrics: ReplicaMetrics, now_s: float) -> None:
        table = self._table
        rows = table.rows(events.request_ids)
        self._times.note(metrics, rows, now_s)
        handles, tokens = table.handle[rows], events.tokens
        if len(self._frontends) == 1:
            next(iter(self._frontends.values())).add_tokens(handles, tokens)
            return
        numbers = table.frontend[rows]
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            self._frontends[number].add_tokens(handles[mine], tokens[mine])

    def _publish_logprobs(self, events: Events) -> None:
        table = self._table
        for logprobs in events.logprobs:
            row = table.row(logprobs.request_id)
            news = pb.Logprobs(handle=int(table.handle[row]), prompt=logprobs.prompt, sampled=logprobs.sampled)
            self._frontends[int(table.frontend[row])].add_logprobs(news)

    def _publish_finished(self, finished: Finished, metrics: ReplicaMetrics, now_s: float) -> None:
        table = self._table
        request = finished.request
        row = table.row(request.id)
        metrics.finished[finished.reason] += 1
        metrics.e2e_s.observe(now_s - float(table.arrival_s[row]))
        metrics.request_prompt_tokens.observe(len(request.prompt))
        metrics.request_generation_tokens.observe(finished.num_output_tokens)
        first_s, last_s = float(table.first_token_s[row]), float(table.last_token_s[row])
        if first_s:
            metrics.prefill_s.observe(first_s - float(table.started_s[row]))
            metrics.decode_s.observe(last_s - first_s)
            if finished.num_output_tokens > 1:
                metrics.tpot_s.observe((last_s - first_s) / (finished.num_output_tokens - 1))
        frontend = self._frontends[int(table.frontend[row])]
        handle = int(table.handle[row])
        frontend.add_finished(
            pb.Finished(
                handle=handle,
                reason=finished.reason,
                stop_token=finished.stop_token,
                cumulative_logprob=finished.cumulative_logprob,
                vector=finished.vector,
                error=finished.error,
            )
        )
        self.close_request(frontend, handle)
