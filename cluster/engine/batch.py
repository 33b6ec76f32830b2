"""Runs a batch of requests on an EngineThread to its end."""

import time
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

from manta.cluster.doors.output import OutputText
from manta.cluster.engine.outputs import CompletionOutput
from manta.cluster.engine.streams import build_submit, refusal
from manta.cluster.engine.thread import EngineThread
from manta.cluster.engine.types import EngineError, GenerationRequest, TokenChunk
from manta.protos import engine_pb2 as pb


class Job:
    """One request of a batch and what has come of it. `text` None leaves the text empty."""

    def __init__(self, request: GenerationRequest, index: int, text: OutputText | None) -> None:
        self.request = request
        self.output = CompletionOutput(index)
        self.num_cached_tokens = 0
        self.arrival_time = 0.0
        self.first_token_time: float | None = None
        self.finished_time: float | None = None
        self._text = text
        self._reads_along = bool(request.sampling.stop)  # else the text is made at the end, in one go
        self._unread: list[int] = []

    def push(self, chunk: TokenChunk) -> bool:
        """Takes new tokens; returns whether the request has ended, be it by a stop string only seen here."""
        if chunk.token_ids and self.first_token_time is None:
            self.first_token_time = time.time()
        if chunk.finish_reason is None and not self._reads_along:
            self._unread += chunk.token_ids
            return False
        chunk.token_ids = self._unread + chunk.token_ids
        self._unread = []
        self._read(chunk)
        if self.output.finish_reason is not None:
            self.finished_time = time.time()
        return self.output.finish_reason is not None

    def _read(self, chunk: TokenChunk) -> None:
        output = self.output
        if self._text is None:
            output.token_ids += chunk.token_ids
            output.finish_reason = chunk.finish_reason
            if chunk.stop_token in self.request.sampling.stop_token_ids:
                output.stop_reason = chunk.stop_token
            return
        delta = self._text.push(chunk)
        output.text += delta.text
        output.token_ids += delta.token_ids
        output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason


class Batch:
    """Keeps at most `window` requests in the engine, in the order of the jobs."""

    def __init__(self, engine: EngineThread, jobs: list[Job], first_handle: int, window: int) -> None:
        self._engine = engine
        self._waiting: Iterator[tuple[int, Job]] = enumerate(jobs, first_handle)
        self._window = window
        self._running: dict[int, Job] = {}

    def run(self, on_finished: Callable[[Job], None]) -> None:
        """Returns when every job has ended. Raises EngineError, and aborts the others, when one fails."""
        try:
            self._fill()
            while self._running:
                for job in self._feed(self._engine.next_message()):
                    on_finished(job)
                self._fill()
        finally:
            if self._running:
                self._engine.abort(list(self._running))

    def _fill(self) -> None:
        taken = list(islice(self._waiting, self._window - len(self._running)))
        if not taken:
            return
        now = time.time()
        for handle, job in taken:
            job.arrival_time = now
            self._running[handle] = job
        self._engine.submit([build_submit(handle, job.request) for handle, job in taken])

    def _feed(self, message: pb.EngineMessage) -> list[Job]:
        """The jobs that ended. News of handles that are not running belong to an earlier batch that was given up."""
        running = self._running
        for refused in message.refused:
            if refused.handle in running:
                raise refusal(refused)
        for started in message.started:
            if started.handle in running:
                running[started.handle].num_cached_tokens = started.num_cached_tokens
        chunks: dict[int, TokenChunk] = {}
        handles = np.frombuffer(message.handles, "<u8").tolist()
        for handle, token in zip(handles, np.frombuffer(message.tokens, "<i4").tolist(), strict=True):
            chunk = chunks.get(handle)
            if chunk is None:
                chunks[handle] = TokenChunk([token])
            else:
                chunk.token_ids.append(token)
        for finished in message.finished:
            chunk = chunks.setdefault(finished.handle, TokenChunk([]))
            chunk.finish_reason = finished.reason
            chunk.stop_token = finished.stop_token if finished.HasField("stop_token") else None
            chunk.error = finished.error
        return self._push(chunks)

    def _push(self, chunks: dict[int, TokenChunk]) -> list[Job]:
        ended = []
        cut = []  # ended by a stop string, which the engine does not know of
        for handle, chunk in chunks.items():
            job = self._running.get(handle)
            if job is None:
                continue
            if chunk.finish_reason == "error":
                raise EngineError(f"request {job.request.request_id}: {chunk.error}")
            is_last = chunk.finish_reason is not None
            if job.push(chunk):
                del self._running[handle]
                ended.append(job)
                if not is_last:
                    cut.append(handle)
        if cut:
            self._engine.abort(cut)
        return ended
