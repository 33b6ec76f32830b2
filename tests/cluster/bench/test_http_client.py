"""The client against a server that answers in every legal way, and in some others."""

import asyncio
import socket
from collections.abc import Coroutine
from typing import Any

import pytest
import uvloop

from manta.cluster.bench.http_client import Address, AnswerError, HttpClient
from tests.support.fake_openai import FakeServer, Reply, Request


class Taken:
    """A Receiver that keeps everything."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self.times_s: list[float] = []

    def on_start(self, status: int) -> None:
        self.status = status

    def on_body(self, piece: bytes, now_s: float) -> None:
        self.body += piece
        self.times_s.append(now_s)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(work, 20))


def fetch(server: FakeServer, num: int = 1, body: bytes = b"{}", **headers: str) -> list[Taken]:
    """Answers of `num` requests, one after the other."""

    async def work() -> list[Taken]:
        client = HttpClient(Address.parse(server.url + "/prefix"), headers)
        answers = [Taken() for _ in range(num)]
        for answer in answers:
            await client.request("POST", "/path", body, answer, b"X-Extra: 1\r\n")
        client.close()
        return answers

    answers: list[Taken] = run(work())
    return answers


async def _json(request: Request, reply: Reply) -> None:
    await reply.json({"got": request.body})


async def _chunked(request: Request, reply: Reply) -> None:
    await reply.stream([b"one ", b"two ", b"x" * 100_000])


async def _until_closed(request: Request, reply: Reply) -> None:
    await reply.start(chunked=False)
    await reply.send(b"to the end")


def test_requests_are_as_they_should() -> None:
    with FakeServer(_json) as server:
        (answer,) = fetch(server, body=b'{"a": "\xc3\xa9"}', Authorization="Bearer k")
        assert (answer.status, answer.body) == (200, b'{"got": {"a": "\\u00e9"}}')
        request = server.requests[0]
        assert (request.method, request.path, request.body) == ("POST", "/prefix/path", {"a": "é"})
        assert request.headers["host"] == server.url.removeprefix("http://")
        assert request.headers["content-type"] == "application/json"
        assert (request.headers["authorization"], request.headers["x-extra"]) == ("Bearer k", "1")


@pytest.mark.parametrize(
    ("behaviour", "body", "num_connections"),
    [(_json, b'{"got": {}}', 1), (_chunked, b"one two " + b"x" * 100_000, 1), (_until_closed, b"to the end", 3)],
)
def test_answers_and_reuse(behaviour: Any, body: bytes, num_connections: int) -> None:
    with FakeServer(behaviour) as server:
        answers = fetch(server, 3)
        assert [answer.body for answer in answers] == [body] * 3
        assert server.num_connections == num_connections


def test_a_connection_closed_while_idle_is_replaced() -> None:
    async def answer_once(request: Request, reply: Reply) -> None:
        await reply.json({})
        reply.is_closed = True

    with FakeServer(answer_once) as server:
        assert [answer.status for answer in fetch(server, 4)] == [200] * 4
        assert len(server.requests) == 4


def test_requests_at_once() -> None:
    """None is answered before all have come: each has a connection of its own."""
    num = 50
    came: list[Request] = []

    async def wait_for_all(request: Request, reply: Reply) -> None:
        came.append(request)
        while len(came) < num:
            await asyncio.sleep(0.001)
        await reply.json(request.body)

    async def work(url: str) -> list[Taken]:
        client = HttpClient(Address.parse(url), {})
        answers = [Taken() for _ in range(num)]
        await asyncio.gather(
            *[client.request("POST", "/", b"[%d]" % number, answer) for number, answer in enumerate(answers)]
        )
        client.close()
        return answers

    with FakeServer(wait_for_all) as server:
        assert [answer.body for answer in run(work(server.url))] == [b"[%d]" % number for number in range(num)]


async def _cut_body(request: Request, reply: Reply) -> None:
    await reply.start()
    await reply.send(b"half")
    await reply.cut()


async def _cut_length(request: Request, reply: Reply) -> None:
    reply.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
    await reply.cut()


async def _cut_at_once(request: Request, reply: Reply) -> None:
    await reply.cut()


async def _cut_head(request: Request, reply: Reply) -> None:
    reply.writer.write(b"HTTP/1.1 200 OK\r\nContent-")
    await reply.cut()


async def _no_http(request: Request, reply: Reply) -> None:
    reply.writer.write(b"220 mail.example ready\r\n")
    await reply.cut()


@pytest.mark.parametrize(
    ("behaviour", "part"),
    [
        (_cut_body, "closed before the answer was complete"),
        (_cut_length, "closed before the answer was complete"),
        (_cut_at_once, "closed the connection without an answer"),
        (_cut_head, "closed"),
        (_no_http, "not an HTTP answer"),
    ],
)
def test_broken_answers(behaviour: Any, part: str) -> None:
    with FakeServer(behaviour) as server, pytest.raises(AnswerError, match=part):
        fetch(server)


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        client = HttpClient(Address.parse(url), {})
        with pytest.raises(AnswerError, match="Connection refused"):
            run(client.request("GET", "/", b"", Taken()))
    with pytest.raises(AnswerError, match="no connection"):
        run(HttpClient(Address.parse("http://no.such.host.invalid"), {}).request("GET", "/", b"", Taken()))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://a:8000", ("http", "a", 8000, "")),
        ("https://a/b/v1/", ("https", "a", 443, "/b/v1")),
        ("http://[::1]:9", ("http", "::1", 9, "")),
    ],
)
def test_addresses(url: str, expected: tuple[str, str, int, str]) -> None:
    address = Address.parse(url)
    assert (address.scheme, address.host, address.port, address.prefix) == expected


@pytest.mark.parametrize("url", ["ftp://a", "a:8000", "http://", "http://a:port"])
def test_no_addresses(url: str) -> None:
    with pytest.raises(ValueError):
        Address.parse(url)
