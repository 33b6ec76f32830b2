"""How a frontend talks to the engine: one stream for all its requests, plain calls for the rest."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from typing import Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from manta.cluster.engine.streams import RequestGroup, StreamTable, run_request
from manta.cluster.engine.types import (
    DrainingError,
    EngineError,
    EngineLostError,
    GenerationRequest,
    InvalidRequestError,
    QueueFullError,
    TokenChunk,
    UnavailableError,
    beams_of,
    num_prompt_tokens_kept,
    resolve_sampling,
)
from manta.cluster.links import LinkLostError
from manta.cluster.streams import Stream, link_address, open_stream
from manta.protos import engine_pb2 as pb
from manta.protos import engine_pb2_grpc

__all__ = [
    "Client",
    "DrainingError",
    "EngineClient",
    "EngineError",
    "EngineLostError",
    "GenerationRequest",
    "Group",
    "InvalidRequestError",
    "QueueFullError",
    "TokenChunk",
    "UnavailableError",
    "beams_of",
    "num_prompt_tokens_kept",
    "resolve_sampling",
]


logger = logging.getLogger(__name__)

# A scheduler that is started again is back within seconds, at the same address.
QUICK_RECONNECT = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)
CHANNEL_OPTIONS = (
    *QUICK_RECONNECT,
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
PATIENCE_S = 120.0  # a scheduler that starts anew imports and reaches its workers in seconds; the host may be loaded
_FIRST_BACKOFF_S = 0.05
_LONGEST_BACKOFF_S = 0.5
_OPEN_TIMEOUT_S = 5.0
_CONNECT = f"/{pb.DESCRIPTOR.services_by_name['Engine'].full_name}/Connect"
_T = TypeVar("_T")


class Group(Protocol):
    """Requests that are submitted together. It must be closed, which aborts those that nobody began to read."""

    def chunks(self, place: int) -> AsyncGenerator[TokenChunk, None]:
        """As `Client.generate`, of requests[place]; once for each."""
        ...

    def close(self) -> None: ...


class Client(Protocol):
    """What frontends use; `EngineClient` reaches another process, `InProcessClient` an engine in this one."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Yields chunks until one has a finish_reason. Closing the iterator early aborts the request.

        Raises InvalidRequestError, QueueFullError, DrainingError or UnavailableError before the first chunk when the
        engine does not take the request, EngineLostError when the connection breaks.
        """
        ...

    def generate_group(self, requests: Sequence[GenerationRequest]) -> "Group":
        """Samples of one prompt, which differ as those of `resolve_sampling` do, or hypotheses of one search: they are
        submitted together when the first is read."""
        ...

    async def info(self) -> pb.InfoResponse: ...
    async def load(self) -> pb.LoadResponse: ...
    async def metrics(self) -> bytes: ...
    async def block_tables(self) -> pb.BlockTablesResponse: ...
    async def drain(self, timeout_s: float) -> bool: ...
    async def close(self) -> None: ...


class EngineClient:
    """A `Client` of an engine in another process. Build it with `await EngineClient.connect(address)`.

    When the connection breaks, it connects again and submits the open requests with the tokens they have: their readers
    notice a pause. Requests that come meanwhile wait for it. After `patience_s` without engine all of them raise
    EngineLostError, and so do new ones until it is back. An engine that gives this client up, or sends nonsense, ends
    the open requests at once.
    """

    def __init__(self, address: str, patience_s: float = PATIENCE_S) -> None:
        self._address = address
        self._patience_s = patience_s
        self._gave_up = False  # there has been no engine for too long
        self._streams = StreamTable()
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = engine_pb2_grpc.EngineStub(self._channel)
        self._stream: Stream | None = None  # None while not connected
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, address: str, timeout_s: float = 30.0, patience_s: float = PATIENCE_S) -> "EngineClient":
        """Raises EngineLostError when no engine answers at `address` ("host:port") in time."""
        client = cls(address, patience_s)
        try:
            client._stream = await client._open(timeout_s, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            await client._channel.close()
            raise EngineLostError(f"no engine answers at {address}: {error.details()}") from None
        client._task = asyncio.create_task(client._stay_connected(client._stream))
        return client

    @property
    def connected(self) -> bool:
        return self._stream is not None

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        return run_request(self._streams, request, self._send)

    def generate_group(self, requests: Sequence[GenerationRequest]) -> RequestGroup:
        return RequestGroup(self._streams, requests, self._send)

    async def info(self) -> pb.InfoResponse:
        return await self._call(self._stub.GetInfo(pb.InfoRequest()))

    async def load(self) -> pb.LoadResponse:
        return await self._call(self._stub.GetLoad(pb.LoadRequest()))

    async def metrics(self) -> bytes:
        response = await self._call(self._stub.GetMetrics(pb.MetricsRequest()))
        return bytes(response.text)

    async def block_tables(self) -> pb.BlockTablesResponse:
        return await self._call(self._stub.GetBlockTables(pb.BlockTablesRequest()))

    async def drain(self, timeout_s: float) -> bool:
        response = await self._call(self._stub.Drain(pb.DrainRequest(timeout_s=timeout_s)))
        return bool(response.drained)

    async def close(self) -> None:
        """Ends the stream; the engine aborts what is open."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._stream is not None:
            self._stream.close()  # the task has done it unless it had not begun
        await self._channel.close()
        self._stream = None
        self._end_all("the client was closed")

    def _send(self, message: pb.FrontendMessage) -> None:
        """Without engine a request stays in the table and is submitted when there is one."""
        if self._stream is not None:
            self._stream.write(message.SerializeToString())
        elif self._gave_up and message.HasField("submit"):
            raise EngineLostError(f"the engine at {self._address} is not connected")

    async def _call(self, call: Awaitable[_T]) -> _T:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise EngineLostError(f"the engine at {self._address} did not answer: {error.details()}") from None

    async def _open(self, timeout_s: float, wait_for_ready: bool = False) -> Stream:
        """A new stream. Raises AioRpcError when the engine does not answer."""
        info = await self._stub.GetInfo(pb.InfoRequest(), timeout=timeout_s, wait_for_ready=wait_for_ready)
        address = link_address(self._address, info.link_port, info.link_socket, info.link_key)
        return await open_stream(address, self._channel, _CONNECT)

    def _end_all(self, reason: str) -> None:
        self._streams.fail_all(lambda: EngineLostError(f"lost the engine at {self._address}: {reason}"))

    async def _stay_connected(self, stream: Stream) -> None:
        while True:
            try:
                reason, can_go_on = await self._read(stream)
            finally:
                stream.close()
            self._stream = None
            logger.warning("lost the engine at %s: %s", self._address, reason)
            if not can_go_on:
                self._end_all(reason)
            stream = await self._reopen(reason)
            messages = self._streams.resubmits()
            self._stream, self._gave_up = stream, False
            for message in messages:
                stream.write(message.SerializeToString())
            logger.warning("the engine at %s is back; %d requests go on", self._address, len(messages))

    async def _reopen(self, reason: str) -> Stream:
        """Returns when the engine is back."""
        backoff_s, began_s = _FIRST_BACKOFF_S, time.monotonic()
        while True:
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)
            try:
                return await self._open(_OPEN_TIMEOUT_S)
            except grpc.aio.AioRpcError:  # not back yet
                if not self._gave_up and time.monotonic() - began_s > self._patience_s:
                    self._gave_up = True
                    self._end_all(reason)

    async def _read(self, stream: Stream) -> tuple[str, bool]:
        """Takes the stream's messages until it ends; returns why, and whether requests can go on with the next one."""
        try:
            while True:
                message = pb.EngineMessage.FromString(await stream.read())
                if message.error:
                    return str(message.error), False
                self._streams.feed(message)
        except grpc.aio.AioRpcError as error:
            can_go_on = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
            return str(error.details() or error.code().name), can_go_on
        except LinkLostError as error:
            return str(error), True
        except (DecodeError, ValueError) as error:
            return f"it sent what is no message ({error})", False
