"""The engine as lines of batches see it: their requests have the lowest priority, and make room when they must."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import cast

from manta.cluster.batches.gate import Place
from manta.cluster.engine.client import Client, GenerationRequest, Group, TokenChunk
from manta.cluster.engine.types import BACKGROUND
from manta.protos import engine_pb2 as pb

current_place: ContextVar[Place] = ContextVar("current_place")  # of the line that the running task answers


class BackgroundClient:
    """A `Client` for the lines of batches.

    When a line has to pause, its request leaves the engine; later it is submitted again with the tokens that it has,
    and goes on as if nothing had been: what is drawn depends on seed and position alone, and what was computed is in
    the prefix cache as long as nobody needs the room. Groups, such as beams, do not pause.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        place = current_place.get()
        tokens = list(request.output_token_ids)
        has_begun = False
        while True:
            await place.wait_running()
            rest = replace(request, priority=BACKGROUND, output_token_ids=list(tokens))
            stream = cast(AsyncGenerator[TokenChunk, None], self._client.generate(rest))
            async with contextlib.aclosing(stream) as chunks:
                while not place.is_paused:
                    chunk = await place.unless_paused(anext(chunks, _END))
                    if chunk is None:
                        break
                    if chunk is _END:
                        return
                    if has_begun:  # of a prompt that comes back nothing new is to be told
                        chunk.num_cached_tokens, chunk.queue_s = 0, 0.0
                    has_begun = True
                    place.begin()
                    tokens += chunk.token_ids
                    yield chunk
                    if chunk.finish_reason is not None:
                        return

    def generate_group(self, requests: Sequence[GenerationRequest]) -> Group:
        current_place.get().begin()  # as far as anybody will know
        return self._client.generate_group([replace(request, priority=BACKGROUND) for request in requests])

    async def info(self) -> pb.InfoResponse:
        return await self._client.info()

    async def load(self) -> pb.LoadResponse:
        return await self._client.load()

    async def metrics(self) -> bytes:
        return await self._client.metrics()

    async def block_tables(self) -> pb.BlockTablesResponse:
        return await self._client.block_tables()

    async def drain(self, timeout_s: float) -> bool:
        return await self._client.drain(timeout_s)

    async def close(self) -> None:
        """Nothing: the client is somebody else's."""


_END = TokenChunk([])
