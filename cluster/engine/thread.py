"""An engine on an event loop of its own in a background thread, for callers that are not asynchronous."""

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

import uvloop

from manta.cluster.engine.bringup import bring_up
from manta.cluster.engine.engine import Engine
from manta.cluster.engine.frontend import Frontend
from manta.cluster.engine.types import EngineLostError
from manta.configs.model import ModelSpec
from manta.configs.schema import ServeConfig
from manta.protos import engine_pb2 as pb

Deliver = Callable[[pb.EngineMessage | None], object]  # None: the engine was closed
T = TypeVar("T")
_STOP_TIMEOUT_S = 10.0


class EngineThread:
    """One frontend of an engine; messages go in and come out through thread-safe calls.

    The constructor returns when the workers hold the model. Raises WorkerError or BringUpError. News goes to `deliver`,
    which is called in the engine's thread and must not block; without it, it waits for `next_message`.
    """

    def __init__(
        self, config: ServeConfig, spec: ModelSpec, addresses: list[list[str]], deliver: Deliver | None = None
    ) -> None:
        self._messages: SimpleQueue[pb.EngineMessage | None] = SimpleQueue()
        self._deliver = deliver or self._messages.put
        self._loop = uvloop.new_event_loop()
        self._engine: Engine | None = None
        self._frontend: Frontend | None = None
        self._forwarder: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="manta-engine", daemon=True)
        self._thread.start()
        try:
            start = asyncio.run_coroutine_threadsafe(self._start(config, spec, addresses), self._loop)
            self.info = start.result()
        except BaseException:
            self.close()
            raise

    def submit(self, submits: list[pb.Submit]) -> None:
        """Handles must be new. Raises EngineLostError once the engine has been closed."""
        if self._loop.is_closed():
            raise EngineLostError("the engine was closed")
        self._loop.call_soon_threadsafe(self._submit, submits)

    def abort(self, handles: list[int]) -> None:
        """Handles that have ended are ignored; closing ends them all."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._abort, handles)

    def next_message(self) -> pb.EngineMessage:
        """Waits for news of any request. Raises EngineLostError once the engine has been closed."""
        message = self._messages.get()
        if message is None:
            self._messages.put(None)  # for whoever asks next
            raise EngineLostError("the engine was closed")
        return message

    def metrics_text(self) -> bytes:
        """Prometheus exposition format."""

        return self.call(lambda engine: engine.metrics_text())

    def call(self, read: Callable[[Engine], T]) -> T:
        """What `read` returns, called in the engine's thread. Raises EngineLostError once it has been closed."""
        if self._loop.is_closed():
            raise EngineLostError("the engine was closed")

        async def run() -> T:
            return read(self._running_engine())

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    def drain(self, timeout_s: float) -> bool:
        """As of the engine. Raises EngineLostError once it has been closed."""
        if self._loop.is_closed():
            raise EngineLostError("the engine was closed")
        return asyncio.run_coroutine_threadsafe(self._running_engine().drain(timeout_s), self._loop).result()

    def close(self) -> None:
        """Ends the engine and the thread. May be called twice."""
        if self._loop.is_closed():
            return
        try:
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(_STOP_TIMEOUT_S)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_STOP_TIMEOUT_S)
            self._loop.close()
            self._deliver(None)

    async def _start(self, config: ServeConfig, spec: ModelSpec, addresses: list[list[str]]) -> pb.InfoResponse:
        deployment = await bring_up(config, spec, addresses)
        self._engine = Engine(config, spec, deployment)
        self._engine.start()
        self._frontend = self._engine.open_frontend()
        self._forwarder = asyncio.create_task(self._forward(self._frontend))
        return self._engine.info()

    async def _stop(self) -> None:
        if self._engine is not None:
            await self._engine.stop()
        if self._forwarder is not None:
            self._forwarder.cancel()
            await asyncio.gather(self._forwarder, return_exceptions=True)

    async def _forward(self, frontend: Frontend) -> None:
        while (message := await frontend.take()) is not None:
            self._deliver(message)

    def _submit(self, submits: list[pb.Submit]) -> None:
        assert self._frontend is not None
        for submit in submits:
            self._running_engine().submit(self._frontend, submit)

    def _abort(self, handles: list[int]) -> None:
        assert self._frontend is not None
        self._running_engine().abort(self._frontend, handles)

    def _running_engine(self) -> Engine:
        assert self._engine is not None, "the constructor has not returned"
        return self._engine
