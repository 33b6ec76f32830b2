"""Frames over a plain socket on the event loop: how messages travel that are sent every step.

A frame is a uint32 little-endian length and so many bytes. The socket is written to at once, in the caller's turn, and
not when the event loop comes round: what waits for a step plan is a device. Who connects sends an empty frame now and
then, which the other side sends back: so both learn of one that is stopped or cut off, too.
"""

import asyncio
import contextlib
import socket
from collections import deque

PING_EVERY_S = 5.0
NUM_SILENT = 4  # so many pings without any frame, and the other side counts as lost; a loaded host may answer late
LENGTH_BYTES = 4
_READ_BYTES = 1 << 16
_PING = bytes(LENGTH_BYTES)


class LinkLostError(ConnectionError):
    """The other side has ended the link, or it broke; the message says how."""


class LinkSilentError(LinkLostError):
    """Nothing has come for too long. The connection is there: the other side is stopped, or cut off."""


class Link:
    """One connection. Made on the event loop that uses it; `sock` is connected and does not block. `pings`: whether
    this side is the one that connected."""

    def __init__(self, sock: socket.socket, *, pings: bool, ping_every_s: float = PING_EVERY_S) -> None:
        self._socket = sock
        self._pings = pings
        self._ping_every_s = ping_every_s
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray(_READ_BYTES)
        self._received = bytearray()  # of a frame that is not complete
        self._frames: deque[bytes] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._unsent = bytearray()
        self._drained: asyncio.Future[None] | None = None
        self._lost: str | None = None
        self._num_silent = 0  # checks since anything was heard: not seconds, as this process may have been stopped, too
        self._loop.add_reader(sock, self._on_readable)
        self._timer = self._loop.call_later(ping_every_s, self._check)

    def write(self, data: bytes) -> None:
        """Sends a frame that is not empty. Never blocks and never raises: who reads learns that the link is lost."""
        self._write(frame(data))

    async def drain(self) -> None:
        """Returns once the other side has made room for all that was written, or the link is lost; one at a time."""
        if self._unsent and self._lost is None:
            self._drained = self._loop.create_future()
            await self._drained

    async def read(self) -> bytes:
        """The next frame; one reader at a time. Raises LinkLostError."""
        while not self._frames:
            if self._lost is not None:
                raise LinkSilentError(self._lost) if self._num_silent >= NUM_SILENT else LinkLostError(self._lost)
            self._reader = self._loop.create_future()
            await self._reader
        return self._frames.popleft()

    def close(self) -> None:
        """What has not been sent is lost. May be called twice."""
        self._lose("it was closed")

    def _write(self, frame: bytes) -> None:
        if self._lost is not None:
            return
        if self._unsent:
            self._unsent += frame
            return
        num_sent = self._send(frame)
        if num_sent < len(frame) and self._lost is None:
            self._unsent += frame[num_sent:]
            self._loop.add_writer(self._socket, self._on_writable)

    def _send(self, data: bytes | bytearray) -> int:
        try:
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._lose(error.strerror or str(error))
            return 0

    def _on_writable(self) -> None:
        del self._unsent[: self._send(self._unsent)]
        if not self._unsent and self._lost is None:
            self._loop.remove_writer(self._socket)
            _wake(self._drained)

    def _on_readable(self) -> None:
        try:
            num_bytes = self._socket.recv_into(self._buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error.strerror or str(error))
            return
        if not num_bytes:
            self._lose("connection lost")
            return
        self._num_silent = 0
        self._take_frames(self._buffer[:num_bytes])
        if self._frames:
            _wake(self._reader)

    def _take_frames(self, data: bytearray) -> None:
        if self._received:
            self._received += data
            data = self._received
        start = 0
        while start + LENGTH_BYTES <= len(data):
            end = start + LENGTH_BYTES + int.from_bytes(data[start : start + LENGTH_BYTES], "little")
            if end > len(data):
                break
            if end > start + LENGTH_BYTES:
                self._frames.append(bytes(data[start + LENGTH_BYTES : end]))
            elif not self._pings:
                self._write(_PING)
            start = end
        del data[:start]  # not a copy of what is left: a large frame comes in thousands of pieces
        self._received = data

    def _check(self) -> None:
        """Every few seconds: pings, and gives up a side that has not been heard of."""
        if self._num_silent >= NUM_SILENT:
            self._lose(f"nothing came for {NUM_SILENT * self._ping_every_s:g} s")
            return
        self._num_silent += 1
        self._timer = self._loop.call_later(self._ping_every_s, self._check)
        if self._pings:
            self._write(_PING)

    def _lose(self, reason: str) -> None:
        if self._lost is not None:
            return
        self._lost = reason
        self._timer.cancel()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        with contextlib.suppress(OSError):
            self._socket.close()
        _wake(self._reader)
        _wake(self._drained)


def _wake(waiter: "asyncio.Future[None] | None") -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


def frame(data: bytes) -> bytes:
    """What is sent for `data`."""
    return len(data).to_bytes(LENGTH_BYTES, "little") + data


async def connect(
    address: str, socket_name: str, key: bytes, timeout_s: float, ping_every_s: float = PING_EVERY_S
) -> Link:
    """A link to "host:port", over the abstract Unix socket of that name if it is on this host. The key goes there and
    comes back: a connection alone does not tell who, if anybody, is at its other end.

    Raises OSError or TimeoutError.
    """
    async with asyncio.timeout(timeout_s):
        sock = _connect_local(socket_name)
        if sock is None:
            sock = await _connect_tcp(address)
        link = Link(sock, pings=True, ping_every_s=ping_every_s)
        try:
            link.write(key)
            if await link.read() != key:
                raise LinkLostError("the key did not come back")
        except BaseException:
            link.close()
            raise
        return link


def _connect_local(name: str) -> socket.socket | None:
    """None where nobody listens under that name: it is the name of a socket of another host."""
    if not name:
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        sock.connect("\0" + name)
    except OSError:
        sock.close()
        return None
    return sock


async def _connect_tcp(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
    except BaseException:
        sock.close()
        raise
    return sock
