"""One HTTP exchange with a JSON body: read it within limits, answer it, and notice when the client goes away."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import orjson
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from manta.cluster.doors import patience
from manta.cluster.doors.errors import Kind, RequestError, from_engine, internal
from manta.cluster.engine.client import EngineError
from manta.cluster.nesting import deep_field, too_deep

JSON = b"application/json"
DONE = b"data: [DONE]\n\n"
logger = logging.getLogger("manta.doors")


class ClientGoneError(Exception):
    """The client closed the connection before the answer was complete."""


class Reply:
    """The answer of one exchange: either one JSON body, or server-sent events."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.is_streaming = False

    async def json(self, value: Any, status: int = 200, headers: list[tuple[bytes, bytes]] | None = None) -> None:
        body = orjson.dumps(value)
        head = [(b"content-type", JSON), (b"content-length", str(len(body)).encode()), *(headers or [])]
        await self._send({"type": "http.response.start", "status": status, "headers": head})
        await self._send({"type": "http.response.body", "body": body})

    async def start_events(self) -> None:
        self.is_streaming = True
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # tells nginx to pass events on at once
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def events(self, data: bytes) -> None:
        """Whole events. Waits while the client's receive buffer is full."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_events(self, data: bytes = b"", is_done_told: bool = True) -> None:
        """The last events; is_done_told: and the line that ends streams of the OpenAI API."""
        await self._send({"type": "http.response.body", "body": data + DONE if is_done_told else data})

    async def error(self, error: RequestError) -> None:
        """As the whole answer, or as the last event of a stream that has begun."""
        if self.is_streaming:
            await self.end_events(b"data: " + orjson.dumps(error.body()) + b"\n\n")
        else:
            await self.json(error.body(), error.kind.value.http, error_headers(error))


Handler = Callable[[dict[str, Any], str, Reply], Coroutine[Any, Any, None]]
Teller = Callable[[RequestError, str, Reply], Awaitable[None]]  # how an API writes an error, given the request id


async def _tell(error: RequestError, request_id: str, reply: Reply) -> None:
    await reply.error(error)


class JsonEndpoint:
    """An ASGI endpoint that gives `handler` the parsed body, the request id and a Reply.

    The handler is cancelled as soon as the client disconnects.
    """

    def __init__(self, handler: Handler, tell: Teller = _tell) -> None:
        self._handler = handler
        self._tell = tell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send)
        await exchange(self._work(scope, receive, reply), scope["request_id"], reply, self._tell)

    async def _work(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        body = await read_json(scope, receive)
        await until_disconnect(receive, self._handler(body, scope["request_id"], reply))


async def exchange(work: Coroutine[Any, Any, None], request_id: str, reply: Reply, tell: Teller = _tell) -> None:
    """Awaits `work`, which answers through `reply`; what it raises is told by `tell`."""
    try:
        await work
    except ClientGoneError:
        return
    except RequestError as error:
        await tell(error, request_id, reply)
    except EngineError as error:
        await tell(from_engine(error), request_id, reply)
    except Exception as error:
        logger.exception("request %s failed", request_id)
        await tell(internal(error), request_id, reply)


def error_headers(error: RequestError) -> list[tuple[bytes, bytes]]:
    headers = []
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, round(error.retry_after_s))).encode()))
    if error.kind is Kind.UNAUTHENTICATED:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.kind in (Kind.TOO_LARGE, Kind.SLOW_SENDER):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    return headers


async def read_json(scope: Scope, receive: Receive) -> dict[str, Any]:
    """The body as a JSON object. Raises RequestError, or ClientGoneError."""
    headers = Headers(scope=scope)
    content_type = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise RequestError(f"Content-Type must be application/json, not {content_type!r}", code="invalid_content_type")
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length) > patience.MAX_BODY_BYTES:
        raise _too_large()
    body = await _read_body(receive)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json")
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, not {type(value).__name__}", code="invalid_json")
    deep = deep_field(body, value)
    if deep is not None:
        raise RequestError(too_deep(deep), deep, "invalid_json")
    return value


async def _read_body(receive: Receive) -> bytearray:
    body = bytearray()
    while True:
        message = await _receive_in_time(receive)
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        body += message.get("body", b"")
        if len(body) > patience.MAX_BODY_BYTES:
            raise _too_large()
        if not message.get("more_body", False):
            return body


async def _receive_in_time(receive: Receive) -> Message:
    try:
        async with asyncio.timeout(patience.SLOW_SENDER_S):
            return await receive()
    except TimeoutError:
        message = f"nothing more of the body came for {patience.SLOW_SENDER_S:g} s"
        raise RequestError(message, code="request_timeout", kind=Kind.SLOW_SENDER) from None


def _too_large() -> RequestError:
    message = f"the body is larger than {patience.MAX_BODY_BYTES // 2**20} MiB"
    return RequestError(message, code="request_too_large", kind=Kind.TOO_LARGE)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work`, but cancels it and raises ClientGoneError when the client disconnects first."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientGoneError
        await worker
    finally:
        worker.cancel()
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await worker


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class RequestIds:
    """ASGI middleware: `scope["request_id"]` is the client's X-Request-Id or a new one, and every answer carries it."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], new_id: Callable[[], str]) -> None:
        self._app = app
        self._new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if is_request_id(given) else self._new_id()
        scope["request_id"] = request_id
        header = (b"x-request-id", request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], header]
            await send(message)

        await self._app(scope, receive, send_with_id)


def is_request_id(text: str) -> bool:
    """Up to 128 printable ASCII characters without spaces: safe in headers and logs."""
    return 0 < len(text) <= 128 and all("!" <= character <= "~" for character in text)
