"""Brings files into the page cache before their contents are asked for, while earlier ones are copied."""

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

CHUNK_BYTES = 16 * 2**20
WINDOW_BYTES = 1024 * 2**20
NUM_THREADS = 4  # a single reader does not keep a fast disk busy
_RWF_NOWAIT = getattr(os, "RWF_NOWAIT", 0)


class Extent(NamedTuple):
    """Bytes begin : end of a file."""

    path: Path
    begin: int
    end: int


class ReadAhead:
    """Reads extents in their order, never more than a window ahead of what `advance` was told.

    A context manager. Threads read and throw away: posix_fadvise asks for a few hundred KiB a call on Linux, whatever
    its arguments. A file that cannot be read is left to whoever needs it, who will say so.
    """

    def __init__(self, extents: Sequence[Extent], window_bytes: int = WINDOW_BYTES) -> None:
        self._chunks = _chunks(extents)
        self._window_bytes = window_bytes
        self._lock = threading.Condition()
        self._begun_bytes = self._done_bytes = 0
        self._ended = False
        num_threads = NUM_THREADS if extents else 0
        self._threads = [
            threading.Thread(target=self._work, name="read-ahead", daemon=True) for _ in range(num_threads)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._ended = True
            self._lock.notify_all()
        for thread in self._threads:
            thread.join()

    def advance(self, num_bytes: int) -> None:
        """So many bytes more, of the extents in their order, are no longer needed."""
        with self._lock:
            self._done_bytes += num_bytes
            self._lock.notify_all()

    def _work(self) -> None:
        buffer = bytearray(CHUNK_BYTES)
        while (chunk := self._take()) is not None:
            try:
                _touch(chunk, buffer)
            except OSError:
                return

    def _take(self) -> Extent | None:
        """The next chunk, when the window has come to it; None when there is none."""
        with self._lock:
            while not self._ended and self._begun_bytes >= self._done_bytes + self._window_bytes:
                self._lock.wait()
            chunk = None if self._ended else next(self._chunks, None)
            if chunk is not None:
                self._begun_bytes += chunk.end - chunk.begin
            return chunk


def _chunks(extents: Sequence[Extent]) -> Iterator[Extent]:
    for extent in extents:
        for begin in range(extent.begin, extent.end, CHUNK_BYTES):
            yield Extent(extent.path, begin, min(begin + CHUNK_BYTES, extent.end))


def _touch(chunk: Extent, buffer: bytearray) -> None:
    """Reads the chunk, unless it seems to be in the page cache."""
    file = os.open(chunk.path, os.O_RDONLY)
    try:
        if not all(_is_cached(file, at) for at in (chunk.begin, (chunk.begin + chunk.end) // 2, chunk.end - 1)):
            os.preadv(file, [memoryview(buffer)[: chunk.end - chunk.begin]], chunk.begin)
    finally:
        os.close(file)


def _is_cached(file: int, at: int) -> bool:
    if not _RWF_NOWAIT:
        return False
    try:
        return os.preadv(file, [bytearray(1)], at, _RWF_NOWAIT) == 1
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):
            return False
        raise
