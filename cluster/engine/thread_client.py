"""A `Client` of an engine in another thread, for the event loop of its user."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from manta.cluster.engine.engine import Engine
from manta.cluster.engine.streams import RequestGroup, StreamTable, run_request
from manta.cluster.engine.thread import EngineThread
from manta.cluster.engine.types import EngineLostError, GenerationRequest, TokenChunk
from manta.protos import engine_pb2 as pb

T = TypeVar("T")


class ThreadClient:
    """Made first, because an EngineThread is built with its `deliver`; then `connect`, and `use` in each event loop.

    It does not own the thread: `close` aborts what is open and leaves the engine running.
    """

    def __init__(self) -> None:
        self._streams = StreamTable()
        self._thread: EngineThread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def connect(self, thread: EngineThread) -> None:
        self._thread = thread

    def use(self, loop: asyncio.AbstractEventLoop) -> None:
        """News is given to the requests in this loop from now on."""
        self._loop = loop

    def deliver(self, message: pb.EngineMessage | None) -> None:
        """Called in the engine's thread; None when the engine was closed."""
        if self._loop is None:
            return
        with contextlib.suppress(RuntimeError):  # the loop was closed, and with it whatever waited for news
            if message is None:
                self._loop.call_soon_threadsafe(self._streams.fail_all, _lost)
            else:
                self._loop.call_soon_threadsafe(self._streams.feed, message)

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        return run_request(self._streams, request, self._send)

    def generate_group(self, requests: Sequence[GenerationRequest]) -> RequestGroup:
        return RequestGroup(self._streams, requests, self._send)

    async def info(self) -> pb.InfoResponse:
        return await self._ask(lambda engine: engine.info())

    async def load(self) -> pb.LoadResponse:
        return await self._ask(lambda engine: engine.load())

    async def metrics(self) -> bytes:
        return await self._ask(lambda engine: engine.metrics_text())

    async def block_tables(self) -> pb.BlockTablesResponse:
        return await self._ask(lambda engine: engine.block_tables())

    async def drain(self, timeout_s: float) -> bool:
        return await asyncio.to_thread(self._running().drain, timeout_s)

    async def close(self) -> None:
        self._streams.fail_all(_lost)

    async def _ask(self, read: Callable[[Engine], T]) -> T:
        return await asyncio.to_thread(self._running().call, read)

    def _send(self, message: pb.FrontendMessage) -> None:
        if message.HasField("submit"):
            self._running().submit([message.submit])
        else:
            self._running().abort(list(message.abort.handles))

    def _running(self) -> EngineThread:
        assert self._thread is not None, "not connected"
        return self._thread


def _lost() -> EngineLostError:
    return EngineLostError("the engine was closed")
