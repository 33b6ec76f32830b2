"""The Messages API with the anthropic package as users have it, and its events and errors as they are written."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from manta.cluster.engine.client import QueueFullError
from tests.support.door_server import DoorThread
from tests.support.fake_client import FakeClient

REPLY = "The quick brown fox, 你好 🙂🚀"
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
def sdk(doors: DoorThread) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=doors.base_url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def scripted(engine: FakeClient, doors: DoorThread) -> list[int]:
    """The fake model says REPLY and ends."""
    tokens = doors.service.validator.tokenizer.encode(REPLY, add_special_tokens=False)
    engine.model = lambda request: tokens
    return tokens


def post(doors: DoorThread, body: dict[str, Any], path: str = "/v1/messages") -> httpx.Response:
    return httpx.post(doors.base_url + path, json=body, timeout=30)


def test_message(sdk: anthropic.Anthropic, scripted: list[int]) -> None:
    message = sdk.messages.create(model="tiny", max_tokens=100, messages=HELLO)
    assert [block.text for block in message.content] == [REPLY]  # type: ignore[union-attr]
    assert (message.role, message.model, message.type) == ("assistant", "tiny", "message")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.output_tokens == len(scripted) + 1  # the end-of-sequence token counts


def test_stream_gives_the_same_message(sdk: anthropic.Anthropic, scripted: list[int]) -> None:
    with sdk.messages.stream(model="tiny", max_tokens=100, messages=HELLO) as stream:
        texts = list(stream.text_stream)
        message = stream.get_final_message()
    assert "".join(texts) == REPLY
    assert len(texts) > 5
    assert [block.text for block in message.content] == [REPLY]  # type: ignore[union-attr]
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == len(scripted) + 1


def test_events_in_their_order(doors: DoorThread, scripted: list[int]) -> None:
    text = post(doors, {"model": "tiny", "max_tokens": 100, "messages": HELLO, "stream": True}).text
    events = [dict(line.split(": ", 1) for line in event.split("\n")) for event in text.strip().split("\n\n")]
    kinds = [event["event"] for event in events]
    assert [json.loads(event["data"])["type"] for event in events] == kinds
    deltas = kinds.count("content_block_delta")
    assert kinds == [
        "message_start", "content_block_start", *["content_block_delta"] * deltas, "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip


def test_what_the_engine_is_asked_for(sdk: anthropic.Anthropic, engine: FakeClient, doors: DoorThread) -> None:
    sdk.messages.create(
        model="tiny",
        max_tokens=7,
        system=[{"type": "text", "text": "be brief"}],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": "three"},
            {"role": "user", "content": "four"},
        ],
        stop_sequences=["END"],
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 5},
    )
    (request,) = engine.submitted
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (7, 0.5, 0.9, 5)
    assert sampling.stop == ("END",)
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ]
    httpx.post(f"{doors.base_url}/v1/chat/completions", json={"messages": chat, "max_tokens": 7}, timeout=30)
    assert list(engine.submitted[1].prompt_token_ids) == list(request.prompt_token_ids)


def test_stop_reasons(sdk: anthropic.Anthropic, scripted: list[int]) -> None:
    message = sdk.messages.create(model="tiny", max_tokens=3, messages=HELLO)
    assert message.stop_reason == "max_tokens"
    message = sdk.messages.create(model="tiny", max_tokens=100, messages=HELLO, stop_sequences=["nothing", "brown"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "brown")
    assert [block.text for block in message.content] == ["The quick "]  # type: ignore[union-attr]


def test_an_answer_that_is_begun_is_continued(sdk: anthropic.Anthropic, engine: FakeClient, doors: DoorThread) -> None:
    begun: Any = [*HELLO, {"role": "assistant", "content": "Well"}]
    sdk.messages.create(model="tiny", max_tokens=2, messages=begun)
    prompt = doors.service.validator.tokenizer.decode(list(engine.submitted[0].prompt_token_ids), True)
    assert prompt.rstrip().endswith("Well")


def test_cached_tokens_are_told_apart(sdk: anthropic.Anthropic, engine: FakeClient, scripted: list[int]) -> None:
    long: Any = [{"role": "user", "content": "hello " * 12}]
    first = sdk.messages.create(model="tiny", max_tokens=2, messages=long).usage
    second = sdk.messages.create(model="tiny", max_tokens=2, messages=long).usage
    assert first.cache_read_input_tokens == 0
    assert second.cache_read_input_tokens
    assert second.input_tokens + second.cache_read_input_tokens == first.input_tokens
    assert len(engine.submitted[0].prompt_token_ids) == first.input_tokens


def test_count_tokens(sdk: anthropic.Anthropic, engine: FakeClient) -> None:
    count = sdk.messages.count_tokens(model="tiny", messages=HELLO, system="be brief").input_tokens
    sdk.messages.create(model="tiny", max_tokens=1, messages=HELLO, system="be brief")
    assert len(engine.submitted[0].prompt_token_ids) == count


BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"model": None}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": ["hello"]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"system": 3}, "system"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "7"}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"stop_sequences": "END"}, "stop_sequences"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"stop_sequences": ["x" * 5000]}, "stop_sequences"),
    ({"stop_sequences": ["x"] * 100}, "stop_sequences"),
    ({"tools": [{"name": "f"}]}, "tools"),
    ({"thinking": {"type": "enabled", "budget_tokens": 99}}, "thinking"),
    ({"stop_sequence": ["x"]}, "stop_sequences"),
    ({"stream": "yes"}, "stream"),
]


@pytest.mark.parametrize(("change", "named"), BAD, ids=[str(change) for change, _ in BAD])
def test_bad_requests_name_the_field(doors: DoorThread, change: dict[str, Any], named: str) -> None:
    answer = post(doors, {"model": "tiny", "max_tokens": 5, "messages": HELLO} | change)
    body = answer.json()
    assert answer.status_code == 400
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert named in body["error"]["message"]
    assert body["request_id"] == answer.headers["x-request-id"]


def test_errors_are_those_of_the_sdk(sdk: anthropic.Anthropic, engine: FakeClient, scripted: list[int]) -> None:
    with pytest.raises(anthropic.NotFoundError):
        sdk.messages.create(model="other", max_tokens=5, messages=HELLO)
    engine.refusal = QueueFullError("the queue is full", 2.0)
    with pytest.raises(anthropic.InternalServerError) as caught:
        sdk.messages.create(model="tiny", max_tokens=5, messages=HELLO)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "2"
    assert "the queue is full" in str(caught.value)


def test_an_engine_lost_in_a_stream_is_an_error_event(
    sdk: anthropic.Anthropic, engine: FakeClient, scripted: list[int]
) -> None:
    engine.lost_after = 3
    with pytest.raises(anthropic.APIStatusError, match="connection to the engine broke"):
        for _ in sdk.messages.create(model="tiny", max_tokens=50, messages=HELLO, stream=True):
            pass


def test_text_that_is_no_json(doors: DoorThread) -> None:
    answer = httpx.post(f"{doors.base_url}/v1/messages", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["type"] == "error"
