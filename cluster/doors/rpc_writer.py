"""Writing to a gRPC stream whose reader may have stopped reading."""

import asyncio
import contextlib
from typing import Any, Self, cast

import grpc

from manta.cluster.doors import patience

_LOOKS_PER_PATIENCE = 4
_END_TIMEOUT_S = 0.1  # to tell a reader that may not listen; what it has not heard by then it hears when it reads again


class SlowReaderError(Exception):
    """The client took nothing for SLOW_READER_S."""


class RpcWriter:
    """`with RpcWriter(context) as writer:` in the task that serves the call.

    One timer per call looks now and then whether a write is stuck: a timeout around each write costs some 7 us a token.
    """

    def __init__(self, context: Any) -> None:
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._task = cast("asyncio.Task[object]", asyncio.current_task())
        self._began_s: float | None = None  # the write under way
        self._is_cut = False

    def __enter__(self) -> Self:
        self._look_again()
        return self

    def __exit__(self, *exc: object) -> None:
        self._timer.cancel()

    async def write(self, response: Any) -> None:
        """Waits while the reader's window is full; nothing piles up meanwhile. Raises SlowReaderError."""
        self._began_s = self._loop.time()
        try:
            await self._context.write(response)
        except asyncio.CancelledError:
            if self._is_cut and self._task.uncancel() == 0:
                raise SlowReaderError from None
            raise  # the client has gone
        finally:
            self._began_s = None

    def _look_again(self) -> None:
        self._timer = self._loop.call_later(patience.SLOW_READER_S / _LOOKS_PER_PATIENCE, self._look)

    def _look(self) -> None:
        if self._began_s is not None and self._loop.time() - self._began_s >= patience.SLOW_READER_S:
            self._is_cut = True
            self._task.cancel()
        else:
            self._look_again()


async def end_slow_call(context: Any) -> None:
    """Ends the call with DEADLINE_EXCEEDED."""
    message = f"nothing was read from this stream for {patience.SLOW_READER_S:g} s"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_END_TIMEOUT_S):
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, message, (("error-code", "slow_reader"),))
