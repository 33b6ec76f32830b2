"""A small HTTP/1.1 client for streamed answers: asyncio transports and httptools, no task switch per piece.

A load generator shares its machine with what it measures, so the cost per streamed token counts; bench/client_cost.py
compares this client with httpx and aiohttp. It keeps connections open, follows no redirects and knows no proxies.
"""

import asyncio
import ssl
import time
from dataclasses import dataclass
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

CONNECT_TIMEOUT_S = 10.0


class AnswerError(Exception):
    """No whole answer came; the message says what happened instead."""


class Receiver(Protocol):
    """What takes one answer as it comes. `now_s` is time.perf_counter() when the bytes were read."""

    def on_start(self, status: int) -> None: ...

    def on_body(self, piece: bytes, now_s: float) -> None: ...


@dataclass(frozen=True)
class Address:
    """Where a server is: scheme, host, port, and the path that comes before every endpoint."""

    scheme: str
    host: str
    port: int
    prefix: str

    @classmethod
    def parse(cls, url: str) -> "Address":
        """Raises ValueError for what is no http(s) URL."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no http:// or https:// URL")
        return cls(
            parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80), parts.path.rstrip("/")
        )

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.prefix}"

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class HttpClient:
    """Connections to one server. Requests on idle connections first, on new ones else: any number at once."""

    def __init__(self, address: Address, headers: dict[str, str], tls: ssl.SSLContext | None = None) -> None:
        """`headers` go with every request; `tls` is needed for https."""
        self._address = address
        self._tls = tls
        lines = {"Host": address.authority, "Accept-Encoding": "identity"} | headers
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode("latin-1")
        self._idle: list[_Connection] = []

    async def request(
        self, method: str, path: str, body: bytes, receiver: Receiver, extra_headers: bytes = b""
    ) -> None:
        """Sends a request and returns when its answer is complete. Raises AnswerError."""
        head = b"%b %b%b HTTP/1.1\r\n%b%b" % (
            method.encode(), self._address.prefix.encode(), path.encode(), self._headers, extra_headers,
        )  # fmt: skip
        if body:
            head += b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
        message = head + b"\r\n" + body
        connection = self._take_idle()
        if connection is not None:
            try:
                return await self._exchange(connection, message, receiver)
            except _StaleError:
                pass  # the server closed the idle connection while the request was on its way
        connection = await self._connect()
        try:
            return await self._exchange(connection, message, receiver)
        except _StaleError:
            raise AnswerError("the server closed the connection without an answer") from None

    def close(self) -> None:
        """Closes idle connections; one in use ends with its request."""
        for connection in self._idle:
            connection.abort()
        self._idle.clear()

    async def _exchange(self, connection: "_Connection", message: bytes, receiver: Receiver) -> None:
        try:
            reusable = await connection.exchange(message, receiver)
        except BaseException:
            connection.abort()
            raise
        if reusable:
            self._idle.append(connection)
        else:
            connection.abort()

    def _take_idle(self) -> "_Connection | None":
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self) -> "_Connection":
        address = self._address
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                loop = asyncio.get_running_loop()
                _, connection = await loop.create_connection(_Connection, address.host, address.port, ssl=self._tls)
        except TimeoutError:
            raise AnswerError(f"no connection within {CONNECT_TIMEOUT_S:.0f} s") from None
        except OSError as error:
            raise AnswerError(f"no connection: {error.strerror or error}") from None
        return connection


class _StaleError(Exception):
    """The connection was closed before the first byte of an answer."""


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time. The on_* methods are httptools' callbacks."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._receiver: Receiver | None = None
        self._done: asyncio.Future[bool] | None = None  # whether the connection can be used again
        self._now_s = 0.0
        self._has_bytes = False
        self._has_head = False
        self._has_length = False

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, message: bytes, receiver: Receiver) -> bool:
        """Returns whether the connection stays open. Raises AnswerError or _StaleError."""
        if self._transport is None:
            raise _StaleError
        self._receiver = receiver
        self._has_bytes = self._has_head = self._has_length = False
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        try:
            return await self._done
        finally:
            self._done = self._receiver = None

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports have no asyncio base class

    def data_received(self, data: bytes) -> None:
        if self._done is None:  # nothing was asked: whatever comes cannot be trusted
            return self.abort()
        self._now_s = time.perf_counter()
        self._has_bytes = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            # An exception of the receiver arrives as the cause of one of httptools.
            self._fail(AnswerError(f"not an HTTP answer: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if not self._has_bytes:
            self._fail(_StaleError())
        elif error is None and self._has_head and not self._has_length:
            self._finish(False)  # an answer without a length ends with its connection
        else:
            reason = f": {error}" if error else ""
            self._fail(AnswerError(f"the connection closed before the answer was complete{reason}"))

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        self._has_head = True
        if self._receiver is not None:
            self._receiver.on_start(self._parser.get_status_code())

    def on_body(self, body: bytes) -> None:
        if self._receiver is not None:
            self._receiver.on_body(body, self._now_s)

    def on_message_complete(self) -> None:
        self._finish(self._parser.should_keep_alive() and self._has_length)

    def _finish(self, is_reusable: bool) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(is_reusable)

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
