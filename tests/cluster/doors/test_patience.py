"""Clients that read slowly, send slowly or send too much: they are cut, and nobody else notices."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from manta.cluster.doors import patience
from manta.cluster.engine.client import GenerationRequest, QueueFullError, TokenChunk
from manta.protos import inference_pb2 as pb
from manta.protos import inference_pb2_grpc as pb_grpc
from tests.support.door_server import DoorThread
from tests.support.fake_client import FakeClient

ENDLESS = 301  # a prompt of this token is answered without an end


@pytest.fixture
def endless(engine: FakeClient, doors: DoorThread) -> FakeClient:
    return never_ending(engine)


def never_ending(engine: FakeClient) -> FakeClient:
    """Requests for the prompt [ENDLESS] get tokens for ever, all others are answered as usual."""
    generate = engine.generate

    async def never_end(request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        engine.submitted.append(request)
        try:
            while True:
                await asyncio.sleep(0)
                yield TokenChunk([300] * 8192)
        finally:
            engine.aborted.append(request.request_id)

    def either(request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        return never_end(request) if list(request.prompt_token_ids) == [ENDLESS] else generate(request)

    engine.generate = either  # type: ignore[method-assign]
    return engine


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def connect(doors: DoorThread) -> socket.socket:
    connection = socket.socket()
    connection.settimeout(20)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # little of what is not read hides in the kernel
    connection.connect(("127.0.0.1", doors.http_port))
    return connection


def post(doors: DoorThread, body: dict[str, Any]) -> socket.socket:
    content = json.dumps(body).encode()
    connection = connect(doors)
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    )
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    """What still comes before the server ends the connection."""
    pieces = []
    try:
        while piece := connection.recv(1 << 20):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "SLOW_READER_S", 0.5)


def ask_neighbour(doors: DoorThread) -> dict[str, Any]:
    body = {"prompt": [9, 10, 11], "temperature": 0, "max_tokens": 40}
    answer: dict[str, Any] = httpx.post(f"{doors.base_url}/v1/completions", json=body, timeout=20).json()["choices"][0]
    return answer


@pytest.mark.usefixtures("impatient")
def test_an_http_stream_that_is_not_read_is_cut(endless: FakeClient, doors: DoorThread) -> None:
    alone = ask_neighbour(doors)
    with post(doors, {"prompt": [ENDLESS], "stream": True, "request_id": "slow"}) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert ask_neighbour(doors) == alone
        wait_for(lambda: endless.aborted == ["cmpl-slow"])
        wait_for(lambda: not len(doors.service.running))
        assert b"[DONE]" not in read_to_end(connection)
    assert ask_neighbour(doors) == alone


@pytest.mark.usefixtures("impatient")
def test_a_grpc_stream_that_is_not_read_is_cut(endless: FakeClient, doors: DoorThread) -> None:
    alone = ask_neighbour(doors)
    with grpc.insecure_channel(doors.grpc_address) as channel:
        request = pb.GenerateRequest(request_id="slow", tokens=pb.TokenIds(ids=[ENDLESS]), stream=True)
        call = pb_grpc.InferenceStub(channel).Generate(request)
        assert next(call).token_ids
        assert ask_neighbour(doors) == alone
        wait_for(lambda: endless.aborted == ["slow"])
        wait_for(lambda: not len(doors.service.running))
        with pytest.raises(grpc.RpcError) as caught:
            for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert dict(caught.value.trailing_metadata())["error-code"] == "slow_reader"
    assert ask_neighbour(doors) == alone


@pytest.mark.usefixtures("impatient")
def test_a_whole_answer_that_is_not_taken_is_dropped(doors: DoorThread, engine: FakeClient) -> None:
    async def much() -> bytes:
        return b"#" * 2**26

    def num_connections() -> int:
        return len(doors.server._http[0].server_state.connections)

    before = num_connections()
    engine.metrics = much  # type: ignore[method-assign]
    with connect(doors) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(12, socket.MSG_PEEK | socket.MSG_WAITALL) == b"HTTP/1.1 200"
        wait_for(lambda: num_connections() == before)


def test_a_server_ends_beside_clients_that_do_not_read(model_folder: Path) -> None:
    engine = never_ending(FakeClient())
    with DoorThread(engine, model_folder) as doors, grpc.insecure_channel(doors.grpc_address) as channel:
        call = pb_grpc.InferenceStub(channel).Generate(
            pb.GenerateRequest(tokens=pb.TokenIds(ids=[ENDLESS]), stream=True)
        )
        with post(doors, {"prompt": [ENDLESS], "stream": True}) as connection:
            assert next(call).token_ids
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            assert not doors.run(lambda: doors.server.stop(0.0))
            assert len(engine.aborted) == 2
            assert not len(doors.service.running)


def test_a_slow_reader_that_does_read_gets_everything(
    endless: FakeClient, doors: DoorThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "SLOW_READER_S", 5.0)
    endless.model = lambda request: [300] * 200
    body = {"prompt": "x", "max_tokens": 200, "stream": True, "return_token_ids": True}
    received = b""
    with post(doors, body) as connection:
        while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            piece = connection.recv(64)
            assert piece
            received += piece
    assert received.count(b'"token_ids":[300]') == 200


def raw(doors: DoorThread, *pieces: bytes) -> tuple[int, dict[str, Any]]:
    """Sends the pieces one after another; the status and the error of the only answer."""
    with socket.create_connection(("127.0.0.1", doors.http_port), timeout=20) as connection:
        for piece in pieces:
            try:
                connection.sendall(piece)
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(0.01)
        head, _, body = read_to_end(connection).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"] if body else {}


START = b"GET /version HTTP/1.1\r\nHost: x\r\n"
LINE = b"X-Filler: " + b"f" * 1000 + b"\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        [START + b"X-Large: " + b"x" * 40_000 + b"\r\n\r\n"],
        [START + LINE * 40 + b"\r\n"],
        [b"GET /version?" + b"q" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"],
        [START + b"X-Endless: ", *[b"x" * 10_000] * 6],
        [START, *[LINE] * 60],
        [b"GET /", *[b"x" * 10_000] * 6],
    ],
    ids=["one header", "many headers", "long address", "endless header", "endless headers", "endless address"],
)
def test_a_large_head_is_refused(doors: DoorThread, http: httpx.Client, pieces: list[bytes]) -> None:
    status, error = raw(doors, *pieces)
    assert (status, error["code"], error["type"]) == (431, "headers_too_large", "RequestTooLargeError")
    assert http.get("/version", headers={"X-Large": "x" * 30_000}).status_code == 200


def test_large_metadata_is_refused(doors: DoorThread) -> None:
    with grpc.insecure_channel(doors.grpc_address, [("grpc.max_metadata_size", 1 << 20)]) as channel:
        stub = pb_grpc.InferenceStub(channel)
        assert stub.GetLoad(pb.GetLoadRequest(), metadata=(("x", "x" * 30_000),)).num_blocks
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetLoad(pb.GetLoadRequest(), metadata=(("x", "x" * 40_000),))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert stub.GetLoad(pb.GetLoadRequest()).num_blocks


def test_large_messages_are_refused(doors: DoorThread, http: httpx.Client) -> None:
    text = "x" * (patience.MAX_BODY_BYTES + 1)
    answer = http.post("/tokenize", json={"prompt": text})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    with grpc.insecure_channel(doors.grpc_address, [("grpc.max_send_message_length", -1)]) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            pb_grpc.InferenceStub(channel).Tokenize(pb.TokenizeRequest(text=text))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "SLOW_SENDER_S", 0.3)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("sent", [b"", b"POST /v1/com", START + b"X-A: b\r\n"])
def test_a_head_that_does_not_come_ends_the_connection(doors: DoorThread, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", doors.http_port), timeout=20) as connection:
        connection.sendall(sent)
        assert read_to_end(connection) == b""


@pytest.mark.usefixtures("hurried")
def test_a_body_that_does_not_come_is_a_408(doors: DoorThread) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    status, error = raw(doors, head + b'{"prompt":')
    assert (status, error["code"]) == (408, "request_timeout")


def test_connections_are_used_again_after_the_time_for_a_head(doors: DoorThread, hurried: None) -> None:
    with httpx.Client(base_url=doors.base_url) as http:
        assert http.get("/version").status_code == 200
        time.sleep(0.6)
        assert http.get("/version").status_code == 200
        assert len(http._transport._pool.connections) == 1  # type: ignore[attr-defined]


def test_no_http_is_told_so(doors: DoorThread) -> None:
    status, error = raw(doors, b"this is not http\r\n\r\n")
    assert (status, error["code"]) == (400, "invalid_http")


def test_a_full_queue_says_when_to_come_back(engine: FakeClient, http: httpx.Client, doors: DoorThread) -> None:
    engine.refusal = QueueFullError("4096 requests are waiting", retry_after_s=7)
    for body in ({"prompt": "x"}, {"prompt": "x", "stream": True}):
        answer = http.post("/v1/completions", json=body)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
        assert answer.json()["error"]["code"] == "queue_full"


def test_deadlines_and_disconnects_end_requests_that_wait(engine: FakeClient, doors: DoorThread) -> None:
    engine.hang_after = 0  # as in the queue
    with grpc.insecure_channel(doors.grpc_address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            list(pb_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="x"), timeout=0.2))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        wait_for(lambda: len(engine.aborted) == 1)
    for stream in (False, True):
        already = len(engine.aborted)
        with post(doors, {"prompt": "x", "stream": stream}):
            wait_for(lambda: len(engine.submitted) == already + 1)  # noqa: B023 - waited for within the loop
        wait_for(lambda: len(engine.aborted) == already + 1)  # noqa: B023


def test_state_of_the_server(engine: FakeClient, doors: DoorThread, http: httpx.Client) -> None:
    live, ready = ("/live", "/health/live"), ("/ready", "/health/ready", "/health")
    assert {http.get(path).status_code for path in (*live, *ready)} == {200}
    engine.healthy, engine.detail = False, "worker 1 is lost"
    assert {http.get(path).status_code for path in live} == {200}
    assert {http.get(path).status_code for path in ready} == {503}
    engine.healthy, engine.hang_after = True, 1
    stop = threading.Event()

    def hold() -> None:
        with httpx.stream("POST", f"{doors.base_url}/v1/completions", json={"prompt": "x", "stream": True}):
            stop.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    wait_for(lambda: http.get("/load").json()["server_load"] == 1)
    stop.set()
    holder.join()
