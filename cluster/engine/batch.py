"""Runs a batch of requests on an EngineThread to its end."""

import time
from collections.abc import Callable, Iterator

import numpy as np

from manta.cluster.doors.output import Delta, OutputText
from manta.cluster.engine.logprobs import Records, no_records, read_records
from manta.cluster.engine.outputs import CompletionOutput
from manta.cluster.engine.streams import build_submit, refusal
from manta.cluster.engine.thread import EngineThread
from manta.cluster.engine.types import EngineError, GenerationRequest, TokenChunk
from manta.protos import engine_pb2 as pb

_SUBMITTED_TOGETHER = 64


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
        self._unread_logprobs: list[bytes] = []
        self._prompt_logprobs: list[bytes] = []
        self.prompt_records: Records | None = None
        self._records = no_records()

    def push(self, chunk: TokenChunk) -> bool:
        """Takes new tokens; returns whether the request has ended, be it by a stop string only seen here."""
        if chunk.token_ids and self.first_token_time is None:
            self.first_token_time = time.time()
        if chunk.prompt_logprobs:
            self._prompt_logprobs.append(chunk.prompt_logprobs)
        if chunk.finish_reason is None and not (self._reads_along and chunk.token_ids):
            self._unread += chunk.token_ids
            self._unread_logprobs.append(chunk.logprobs)
            return False
        chunk.token_ids = self._unread + chunk.token_ids
        chunk.logprobs = b"".join([*self._unread_logprobs, chunk.logprobs])
        chunk.prompt_logprobs, self._prompt_logprobs = b"".join(self._prompt_logprobs), []
        self._unread, self._unread_logprobs = [], []
        self._read(chunk)
        if chunk.cumulative_logprob is not None:
            self.output.cumulative_logprob = chunk.cumulative_logprob
        if self.output.finish_reason is not None:
            self.finished_time = time.time()
        return self.output.finish_reason is not None

    def finish(self, decode: Callable[[int], str] | None) -> None:
        """Fills in what is made of all tokens together, when the request has ended; decode: the text of a token."""
        if self.request.sampling.logprobs is not None:
            self.output.logprobs = self._records.by_token(self.output.token_ids, decode)
            self.output.cumulative_logprob = sum(self._records.chosen)

    def _read(self, chunk: TokenChunk) -> None:
        output = self.output
        delta = self._plain_delta(chunk) if self._text is None else self._text.push(chunk)
        output.text += delta.text
        output.token_ids += delta.token_ids
        output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason
        if delta.logprobs is not None:
            self._records.extend(delta.logprobs)
        if delta.prompt_logprobs is not None:
            self.prompt_records = delta.prompt_logprobs

    def _plain_delta(self, chunk: TokenChunk) -> Delta:
        """Without text."""
        sampling = self.request.sampling
        delta = Delta("", chunk.token_ids, chunk.finish_reason)
        if chunk.stop_token in sampling.stop_token_ids:
            delta.stop_reason = chunk.stop_token
        if sampling.logprobs is not None:
            delta.logprobs = read_records(chunk.logprobs, sampling.logprobs)
        if sampling.prompt_logprobs is not None:
            delta.prompt_logprobs = read_records(chunk.prompt_logprobs, sampling.prompt_logprobs)
        return delta


class Batch:
    """Keeps about `window` requests in the engine, in the order of the jobs, which are taken as there is room. Those in
    one list are samples of a prompt, or hypotheses of a search, and are submitted as one."""

    def __init__(self, engine: EngineThread, jobs: Iterator[list[Job]], first_handle: int, window: int) -> None:
        self._engine = engine
        self._waiting = jobs
        self._next_handle = first_handle
        self._window = window
        self._running: dict[int, Job] = {}

    def run(self, on_finished: Callable[[Job], object]) -> None:
        """Returns when every job has ended. Raises EngineError, and aborts the others, when one fails; so does whatever
        the iterator of the jobs raises."""
        try:
            self._fill()
            while self._running:
                for job in self._feed(self._engine.next_message()):
                    on_finished(job)
                self._fill()
        finally:
            if self._running:
                self._engine.abort(list(self._running))

    @property
    def last_handle(self) -> int:
        """That was given to a job."""
        return self._next_handle - 1

    def _fill(self) -> None:
        submits: list[pb.Submit] = []
        now = time.time()
        while len(self._running) < self._window and (jobs := next(self._waiting, None)):
            if len(submits) >= _SUBMITTED_TOGETHER:  # the engine has work while the next ones are tokenized
                self._engine.submit(submits)
                submits, now = [], time.time()
            submits.append(build_submit(self._next_handle, jobs[0].request, len(jobs)))
            for job in jobs:
                job.arrival_time = now
                self._running[self._next_handle] = job
                self._next_handle += 1
        if submits:
            self._engine.submit(submits)

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
        for logprobs in message.logprobs:
            chunk = chunks.setdefault(logprobs.handle, TokenChunk([]))
            chunk.logprobs += logprobs.sampled
            chunk.prompt_logprobs += logprobs.prompt
        for finished in message.finished:
            chunk = chunks.setdefault(finished.handle, TokenChunk([]))
            chunk.finish_reason = finished.reason
            chunk.stop_token = finished.stop_token if finished.HasField("stop_token") else None
            chunk.error = finished.error
            chunk.vector = finished.vector
            if finished.HasField("cumulative_logprob"):
                chunk.cumulative_logprob = finished.cumulative_logprob
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
