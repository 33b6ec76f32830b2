"""One frontend as the engine sees it: its unfinished requests, and what it has yet to be sent. Steps that it was too
slow for are merged into one message."""

import asyncio

import numpy as np
from numpy.typing import NDArray

from manta.protos import engine_pb2 as pb

MAX_PENDING_BYTES = 64 * 2**20  # about five million tokens: a frontend this far behind does not read any more
_BYTES_PER_TOKEN = 12


class SlowFrontendError(Exception):
    """The frontend stopped reading; its stream must end."""


class Frontend:
    """Owned by the engine, read by one consumer. Adding never blocks."""

    def __init__(self, number: int, max_pending_bytes: int = MAX_PENDING_BYTES) -> None:
        self.number = number
        self.requests: dict[int, int] = {}  # handle -> the engine's request id, unfinished ones
        self._max_pending_bytes = max_pending_bytes
        self._pending_bytes = 0
        self._handles: list[bytes] = []
        self._tokens: list[bytes] = []
        self._started: list[pb.Started] = []
        self._finished: list[pb.Finished] = []
        self._refused: list[pb.Refused] = []
        self._logprobs: list[pb.Logprobs] = []
        self._filled = asyncio.Event()
        self._closed = False

    def add_tokens(self, handles: NDArray[np.uint64], tokens: NDArray[np.int32]) -> None:
        """One token per handle, in the order they were generated."""
        self._pending_bytes += _BYTES_PER_TOKEN * len(tokens)
        if self._pending_bytes <= self._max_pending_bytes:  # beyond it the stream ends: nothing is worth keeping
            self._handles.append(handles.tobytes())
            self._tokens.append(tokens.tobytes())
        self._filled.set()

    def add_logprobs(self, logprobs: pb.Logprobs) -> None:
        """Records of a request, in the order of its tokens."""
        self._pending_bytes += len(logprobs.prompt) + len(logprobs.sampled)
        if self._pending_bytes <= self._max_pending_bytes:
            self._logprobs.append(logprobs)
        self._filled.set()

    def add_started(self, started: pb.Started) -> None:
        self._started.append(started)
        self._filled.set()

    def add_finished(self, finished: pb.Finished) -> None:
        self._pending_bytes += len(finished.vector)
        if self._pending_bytes <= self._max_pending_bytes:
            self._finished.append(finished)
        self._filled.set()

    def add_refused(self, refused: pb.Refused) -> None:
        self._refused.append(refused)
        self._filled.set()

    def close(self) -> None:
        """`take` returns what is left, then None."""
        self._closed = True
        self._filled.set()

    async def take(self) -> pb.EngineMessage | None:
        """Waits for news and returns all of it; None after `close`. Raises SlowFrontendError."""
        while not self._filled.is_set():
            await self._filled.wait()
        if self._pending_bytes > self._max_pending_bytes:
            raise SlowFrontendError(
                f"the frontend left {self._pending_bytes} bytes of tokens unread; at most {self._max_pending_bytes}"
            )
        empty = not (self._tokens or self._started or self._finished or self._refused or self._logprobs)
        if self._closed and empty:
            return None
        message = pb.EngineMessage(
            handles=b"".join(self._handles),
            tokens=b"".join(self._tokens),
            started=self._started,
            finished=self._finished,
            refused=self._refused,
            logprobs=self._logprobs,
        )
        self._handles, self._tokens = [], []
        self._started, self._finished, self._refused, self._logprobs = [], [], [], []
        self._pending_bytes = 0
        if not self._closed:
            self._filled.clear()
        return message
