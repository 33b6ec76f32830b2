"""A small HTTP server on a thread whose answers a test writes byte by byte, to see how clients take them."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Self

DONE = b"data: [DONE]\n\n"


@dataclass
class Request:
    """What came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any = None


@dataclass
class Reply:
    """Writes the answer of one request."""

    writer: asyncio.StreamWriter
    is_closed: bool = False
    _is_chunked: bool = field(default=False, init=False)

    async def json(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))
        await self.writer.drain()

    async def start(self, chunked: bool = True) -> None:
        """Headers of a stream; not chunked, it ends with the connection."""
        self._is_chunked = chunked
        self.is_closed = not chunked
        encoding = b"Transfer-Encoding: chunked\r\n" if chunked else b"Connection: close\r\n"
        self.writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n%b\r\n" % encoding)
        await self.writer.drain()

    async def send(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)
        await self.writer.drain()

    async def end(self) -> None:
        if self._is_chunked:
            self.writer.write(b"0\r\n\r\n")
            await self.writer.drain()

    async def stream(self, events: list[bytes]) -> None:
        """The whole answer in one go."""
        await self.start()
        for data in events:
            await self.send(data)
        await self.end()

    async def cut(self) -> None:
        """Closes the connection in the middle of whatever was sent."""
        self.is_closed = True


Behaviour = Callable[[Request, Reply], Awaitable[None]]


class FakeServer:
    """`with FakeServer(behaviour) as server:` serves at `server.url` until the block ends."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.requests: list[Request] = []
        self.num_connections = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def posts(self, path: str = "/v1/completions") -> list[Any]:
        """Bodies that came to `path`."""
        return [request.body for request in self.requests if request.path == path and request.method == "POST"]

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.num_connections += 1
        try:
            while not writer.is_closing() and (request := await _read(reader)):
                self.requests.append(request)
                reply = Reply(writer)
                await self.behaviour(request, reply)
                if reply.is_closed:
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away
        finally:
            self._tasks.discard(task)
            writer.close()


async def _read(reader: asyncio.StreamReader) -> Request | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    method, path, _ = first.split(" ")
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Request(method, path, headers, json.loads(body) if body else None)


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def completion_events(texts: list[str], usage: dict[str, Any] | None = None) -> list[bytes]:
    """Chunks of /v1/completions, the last text with its finish_reason, then usage and [DONE]."""
    events = [
        event({"choices": [{"index": 0, "text": text, "finish_reason": "length" if i == len(texts) - 1 else None}]})
        for i, text in enumerate(texts)
    ]
    return events + ([event({"choices": [], "usage": usage})] if usage else []) + [DONE]


def chat_events(texts: list[str], usage: dict[str, Any] | None = None) -> list[bytes]:
    """Chunks of /v1/chat/completions: the role, the texts, the finish_reason, then usage and [DONE]."""
    deltas = [{"role": "assistant", "content": ""}, *({"content": text} for text in texts)]
    events = [event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}) for delta in deltas]
    events.append(event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
    return events + ([event({"choices": [], "usage": usage})] if usage else []) + [DONE]


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int | None = None) -> dict[str, Any]:
    usage: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    return usage if cached_tokens is None else usage | {"prompt_tokens_details": {"cached_tokens": cached_tokens}}


async def answer_well(request: Request, reply: Reply) -> None:
    """A server without a flaw: it lists one model and gives as many one-letter tokens as were asked for."""
    if request.path == "/v1/models":
        return await reply.json({"object": "list", "data": [{"id": "fake", "max_model_len": 2048}]})
    body = request.body
    if request.path == "/v1/chat/completions":
        num_tokens = body["max_completion_tokens"]
        num_input = len(body["messages"][0]["content"].split()) + 3
        return await reply.stream(chat_events(["a"] * num_tokens, usage_of(num_input, num_tokens, 0)))
    num_tokens = body["max_tokens"]
    return await reply.stream(completion_events(["a"] * num_tokens, usage_of(len(body["prompt"]), num_tokens, 2)))
