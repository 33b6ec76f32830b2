"""Writing to a gRPC stream whose reader may have stopped reading."""

import asyncio
import contextlib
from typing import Any

import grpc

from manta.cluster.doors import patience

_END_TIMEOUT_S = 0.1  # to tell a reader that may not listen; what it has not heard by then it hears when it reads again


class SlowReaderError(Exception):
    """The client took nothing for SLOW_READER_S."""


async def write_in_time(context: Any, response: Any) -> None:
    """Waits while the reader's window is full, nothing piles up meanwhile. Raises SlowReaderError."""
    try:
        async with asyncio.timeout(patience.SLOW_READER_S):
            await context.write(response)
    except TimeoutError:
        raise SlowReaderError from None


async def end_slow_call(context: Any) -> None:
    """Ends the call with DEADLINE_EXCEEDED."""
    message = f"nothing was read from this stream for {patience.SLOW_READER_S:g} s"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_END_TIMEOUT_S):
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, message, (("error-code", "slow_reader"),))
