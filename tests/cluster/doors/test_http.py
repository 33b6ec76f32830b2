"""HTTP as it is on the wire: exact events, malformed input, states of the server."""

import asyncio
import json
import re
import socket
from typing import Any

import httpx
import pytest

from manta.cluster.engine.client import TokenChunk
from tests.support.door_server import DoorThread
from tests.support.fake_client import FakeClient


def events(response: httpx.Response) -> list[str]:
    text = re.sub(r'"created":\d+', '"created":0', response.text)
    assert text.endswith("\n\n")
    return text[:-2].split("\n\n")


def say(doors: DoorThread, text: str) -> None:
    tokens = doors.service.validator.tokenizer.encode(text, add_special_tokens=False)
    doors.client.model = lambda request: tokens


def test_exact_chat_events(doors: DoorThread, http: httpx.Client) -> None:
    say(doors, "Hello world")
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    response = http.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "abc"})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-request-id"] == "abc"
    head = 'data: {"id":"chatcmpl-abc","object":"chat.completion.chunk","created":0,"model":"tiny","choices":['
    tail = '"logprobs":null,"finish_reason":null}],"usage":null}'
    got = events(response)
    assert got[0] == f'{head}{{"index":0,"delta":{{"role":"assistant","content":""}},{tail}'
    assert all(event.startswith(f'{head}{{"index":0,"delta":{{"content":') for event in got[1:-3])
    assert "".join(json.loads(event[6:])["choices"][0]["delta"]["content"] for event in got[1:-3]) == "Hello world"
    assert all(event.endswith(tail) for event in got[:-3])
    reasons = '"finish_reason":"stop","stop_reason":null'
    assert got[-3] == f'{head}{{"index":0,"delta":{{}},"logprobs":null,{reasons}}}],"usage":null}}'
    usage = json.loads(got[-2][6:])["usage"]
    assert got[-2].startswith(f'{head}],"usage":{{"prompt_tokens":')
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert got[-1] == "data: [DONE]"


def test_exact_completion_events(doors: DoorThread, http: httpx.Client) -> None:
    say(doors, "🙂")
    response = http.post("/v1/completions", json={"prompt": "x", "stream": True, "echo": True, "request_id": "r1"})
    head = 'data: {"id":"cmpl-r1","object":"text_completion","created":0,"model":"tiny","choices":[{"index":0,"text":'
    got = events(response)
    assert got[0] == head + '"x","logprobs":null,"finish_reason":null,"stop_reason":null}]}'
    assert got[1] == head + '"🙂","logprobs":null,"finish_reason":null,"stop_reason":null}]}'
    assert got[2] == head + '"","logprobs":null,"finish_reason":"stop","stop_reason":null}]}'
    assert got[3:] == ["data: [DONE]"]


def test_error_in_mid_stream_is_an_event_before_done(engine: FakeClient, http: httpx.Client) -> None:
    engine.lost_after = 3
    got = events(http.post("/v1/completions", json={"prompt": "x", "stream": True}))
    error = json.loads(got[-2][6:])["error"]
    assert error == {
        "message": "the connection to the engine broke",
        "type": "ServiceUnavailableError",
        "param": None,
        "code": "engine_lost",
    }
    assert got[-1] == "data: [DONE]"


def test_headers_go_out_while_a_request_waits_long(engine: FakeClient, http: httpx.Client, doors: DoorThread) -> None:
    engine.hang_after = 0
    with http.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True, "request_id": "w"}) as response:
        assert response.status_code == 200
        assert doors.run(lambda: _abort(doors, "cmpl-w"))
        response.read()
    assert '"finish_reason":"abort"' in response.text
    assert response.text.endswith("data: [DONE]\n\n")


async def _abort(doors: DoorThread, request_id: str) -> bool:
    return doors.service.running.abort(request_id)


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"{", {}, 400, "invalid_json"),
        (b"", {}, 400, "invalid_json"),
        (b"[1]", {}, 400, "invalid_json"),
        (b'"text"', {}, 400, "invalid_json"),
        (b'{"prompt": "\xff"}', {}, 400, "invalid_json"),
        (b'{"prompt": "\\ud800"}', {}, 400, "invalid_json"),
        (b'{"prompt": NaN}', {}, 400, "invalid_json"),
        (b"[" * 100_000, {}, 400, "invalid_json"),
        (b'{"prompt": ' + b"[" * 1000 + b"]" * 1000 + b"}", {}, 400, "invalid_json"),
        (b'{"prompt": "x"}', {"content-type": "text/plain"}, 400, "invalid_content_type"),
        (b" " * (32 * 2**20 + 1), {}, 413, "request_too_large"),
    ],
)
def test_malformed_bodies(http: httpx.Client, content: bytes, headers: dict[str, str], status: int, code: str) -> None:
    response = http.post("/v1/completions", content=content, headers={"content-type": "application/json"} | headers)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers["x-request-id"]
    assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def raw(doors: DoorThread, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", doors.http_port), timeout=10) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


def test_broken_http_is_answered_and_harms_nobody(doors: DoorThread, http: httpx.Client) -> None:
    assert b"400 Bad Request" in raw(doors, b"this is not http\r\n\r\n")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    assert b"400" in raw(doors, head + b'Content-Length: 5\r\n\r\n{"a":').split(b"\r\n")[0]
    assert b"413" in raw(doors, head + b"Content-Length: 99999999999\r\n\r\n").split(b"\r\n")[0]
    oversized = b"".join(b"100000\r\n" + b" " * 0x100000 + b"\r\n" for _ in range(32)) + b"1\r\n \r\n0\r\n\r\n"
    assert b"413" in raw(doors, head + b"Transfer-Encoding: chunked\r\n\r\n" + oversized).split(b"\r\n")[0]
    with socket.create_connection(("127.0.0.1", doors.http_port)) as connection:
        connection.sendall(head + b"Content-Length: 100\r\n\r\n{")  # and goes away in mid-body
    assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200
    assert len(doors.service.running) == 0


def test_unknown_paths_and_methods(http: httpx.Client) -> None:
    response = http.get("/v1/edits")
    assert (response.status_code, response.json()["error"]["type"]) == (404, "NotFoundError")
    response = http.get("/v1/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["code"] == "method_not_allowed"
    assert http.head("/health").status_code == 200
    preflight = {"Origin": "http://a", "Access-Control-Request-Method": "POST"}
    assert http.options("/v1/completions", headers=preflight).headers["access-control-allow-origin"] == "*"


def test_state_endpoints(engine: FakeClient, http: httpx.Client) -> None:
    assert http.get("/health").status_code == http.get("/ready").status_code == http.get("/ping").status_code == 200
    assert http.get("/version").json()["version"]
    assert http.get("/load").json()["num_blocks"] == 64
    metrics = http.get("/metrics")
    assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "vllm:num_requests_running 0" in metrics.text
    engine.tables.sequences.add(request_id="seen", blocks=[3], ref_counts=[1], num_tokens=5)
    assert http.get("/block_tables").json()["sequences"][0]["request_id"] == "seen"
    assert "seen" in http.get("/block_tables?format=text").text
    assert http.get("/block_tables?format=xml").json()["error"]["param"] == "format"
    engine.detail = "replica 1: worker 1 is lost"
    assert http.get("/health").json() == {"status": "ok", "detail": "replica 1: worker 1 is lost"}
    engine.healthy, engine.detail = False, "worker 1 is lost"
    response = http.get("/health")
    assert (response.status_code, response.json()["error"]["message"]) == (503, "worker 1 is lost")


def test_tokenize_and_detokenize(http: httpx.Client, doors: DoorThread) -> None:
    text = "Hello 你好"
    answer = http.post("/tokenize", json={"model": "tiny", "prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == doors.service.validator.tokenizer.hf.encode(text)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 256
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"] == "<|user|>hi\n<|assistant|>"
    for path, body in [
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": []}),
        ("/detokenize", {"tokens": [512]}),
        ("/detokenize", {"tokens": "abc"}),
        ("/detokenize", {}),
    ]:
        assert http.post(path, json=body).status_code == 400, (path, body)


def test_equal_request_ids_do_not_disturb_each_other(http: httpx.Client, engine: FakeClient, doors: DoorThread) -> None:
    engine.hang_after = 1
    request = {"json": {"prompt": "x", "stream": True, "echo": True}, "headers": {"X-Request-Id": "same"}}
    with (
        http.stream("POST", "/v1/completions", **request) as first,  # type: ignore[arg-type]
        http.stream("POST", "/v1/completions", **request) as second,  # type: ignore[arg-type]
    ):
        lines = [response.iter_lines() for response in (first, second)]
        ids = [json.loads(next(each)[6:])["id"] for each in lines]
        assert ids[0] == "cmpl-same"
        assert re.fullmatch("cmpl-same-[0-9a-f]{8}", ids[1])
        assert all(request_id in doors.service.running for request_id in ids)
        assert first.headers["x-request-id"] == second.headers["x-request-id"] == "same"


def test_a_reader_that_stops_reading_stops_the_engine(engine: FakeClient, doors: DoorThread) -> None:
    """What the client does not take is not read from the engine either."""
    sent = 0

    async def endless(request: Any) -> Any:
        nonlocal sent
        while True:
            sent += 1
            await asyncio.sleep(0)
            yield TokenChunk([300] * 8192)

    engine.generate = endless  # type: ignore[method-assign]
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", doors.http_port)) as connection:
        connection.sendall(head + body)
        connection.recv(100)
        counts = [-1, sent]
        while counts[-1] != counts[-2]:  # until nothing moves between two round trips
            for _ in range(20):
                httpx.get(f"{doors.base_url}/version")
            counts.append(sent)
        assert counts[-1] < 10_000
