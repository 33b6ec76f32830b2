"""Streams of serialized messages between two processes: a link, or a gRPC stream where there is none."""

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import Protocol

import grpc
import grpc.aio

from manta.cluster.links import PING_EVERY_S, LinkLostError, connect

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 5.0


class Stream(Protocol):
    """`write` neither blocks nor raises: who reads learns what is wrong."""

    def write(self, data: bytes) -> None: ...
    async def read(self) -> bytes:
        """The next message. Raises LinkLostError or AioRpcError."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """Where a process takes links."""

    address: str  # "host:port"
    socket_name: str  # of an abstract Unix socket on that host; may be empty
    key: bytes


class GrpcStream:
    """A bidirectional call of serialized messages as a Stream; gRPC takes one write at a time."""

    def __init__(self, call: "grpc.aio.StreamStreamCall[bytes, bytes]") -> None:
        self._call = call
        self._unsent: asyncio.Queue[bytes] = asyncio.Queue()
        self._writer: asyncio.Task[None] | None = None

    def write(self, data: bytes) -> None:
        self._unsent.put_nowait(data)
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())

    async def read(self) -> bytes:
        message = await self._call.read()
        if not isinstance(message, bytes):
            raise LinkLostError("it ended its stream")
        return message

    def close(self) -> None:
        self._call.cancel()
        if self._writer is not None:
            self._writer.cancel()

    async def _write(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._call.write(await self._unsent.get())


def link_address(called_at: str, port: int, socket_name: str, key: bytes) -> LinkAddress | None:
    """Of a process that is called at "host:port" over gRPC and says that it takes links; None if `port` is 0."""
    if not port:
        return None
    return LinkAddress(f"{called_at.rpartition(':')[0]}:{port}", socket_name, key)


async def open_stream(
    address: LinkAddress | None, channel: grpc.aio.Channel, method: str, ping_every_s: float = PING_EVERY_S
) -> Stream:
    """A link where there is an address that can be reached, else a call of the channel's `method`."""
    if address is not None:
        try:
            return await connect(address.address, address.socket_name, address.key, _CONNECT_TIMEOUT_S, ping_every_s)
        except (OSError, TimeoutError) as error:
            reason = str(error) or "no answer in time"
            logger.warning("no link to %s (%s): messages go over gRPC", address.address, reason)
    return GrpcStream(channel.stream_stream(method)())
