"""A `Client` around an engine on the same event loop."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from manta.cluster.engine.engine import Engine
from manta.cluster.engine.streams import RequestGroup, StreamTable, run_request
from manta.cluster.engine.types import EngineLostError, GenerationRequest, TokenChunk
from manta.protos import engine_pb2 as pb


class InProcessClient:
    """One frontend of `engine`. Must be made and used on the engine's event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._streams = StreamTable()
        self._frontend = engine.open_frontend()
        self._reader = asyncio.create_task(self._read())

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        return run_request(self._streams, request, self._send)

    def generate_group(self, requests: Sequence[GenerationRequest]) -> RequestGroup:
        return RequestGroup(self._streams, requests, self._send)

    async def info(self) -> pb.InfoResponse:
        return self._engine.info()

    async def load(self) -> pb.LoadResponse:
        return self._engine.load()

    async def metrics(self) -> bytes:
        return self._engine.metrics_text()

    async def block_tables(self) -> pb.BlockTablesResponse:
        return self._engine.block_tables()

    async def drain(self, timeout_s: float) -> bool:
        return await self._engine.drain(timeout_s)

    async def close(self) -> None:
        """Aborts what is open."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        self._engine.close_frontend(self._frontend)
        self._streams.fail_all(lambda: EngineLostError("the engine was closed"))

    def _send(self, message: pb.FrontendMessage) -> None:
        if message.HasField("submit"):
            self._engine.submit(self._frontend, message.submit)
        else:
            self._engine.abort(self._frontend, list(message.abort.handles))

    async def _read(self) -> None:
        while (message := await self._frontend.take()) is not None:
            self._streams.feed(message)
