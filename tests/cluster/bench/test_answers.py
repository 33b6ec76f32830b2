"""What a record says of an answer, for the ways in which servers write and break them."""

import json

import pytest

from manta.cluster.bench.answers import AnswerReader, Record, error_message
from tests.support.fake_openai import DONE, chat_events, completion_events, event, usage_of


def read(pieces: list[tuple[float, bytes]], is_chat: bool = False, status: int = 200, end_s: float = 99.0) -> Record:
    """The record of an answer whose pieces came at the given times; it was sent at 0."""
    record = Record(prompt_len=5, wanted_output_len=9)
    reader = AnswerReader(record, is_chat, keeps_text=True)
    reader.on_start(status)
    for now_s, piece in pieces:
        reader.on_body(piece, now_s)
    reader.close(end_s)
    return record


def timed(events: list[bytes]) -> list[tuple[float, bytes]]:
    """One event per second, from 1 on."""
    return [(float(number), data) for number, data in enumerate(events, 1)]


def test_completion() -> None:
    record = read(timed(completion_events(["a", "bc", "", "d"], usage_of(17, 6, 16))))
    assert record.is_success
    assert record.text == "abcd"
    assert record.chunk_times_s == [1, 2, 4], "a chunk without text is none"
    assert (record.ttft_s, record.latency_s, record.tpot_s) == (1, 4, 3 / 5)
    assert (record.prompt_len, record.output_len, record.num_cached_tokens) == (17, 6, 16)
    assert record.finish_reason == "length"


def test_chat_counts_neither_the_role_nor_the_end() -> None:
    record = read(timed(chat_events(["x", "y"], usage_of(4, 2))), is_chat=True)
    assert record.is_success
    assert record.text == "xy"
    assert record.chunk_times_s == [2, 3]
    assert record.latency_s == 4, "the answer ends with its finish_reason"
    assert record.num_cached_tokens is None


@pytest.mark.parametrize(
    "delta",
    [{"reasoning_content": "hm"}, {"reasoning": "hm"}, {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}],
)
def test_chat_output_of_other_kinds(delta: dict[str, object]) -> None:
    events = [event({"choices": [{"delta": delta}]}), event({"choices": [{"delta": {}, "finish_reason": "stop"}]})]
    assert read(timed(events), is_chat=True).chunk_times_s == [1]


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_split_at_every_byte(is_chat: bool, newline: bytes) -> None:
    make = chat_events if is_chat else completion_events
    stream = b"".join([b": ping\n\n", *make(["é", "b\n", "[DONE]"], usage_of(3, 3))]).replace(b"\n", newline)
    whole = read([(1.0, stream)], is_chat)
    assert whole.is_success
    assert whole.text == "éb\n[DONE]"
    assert whole.chunk_times_s == [1, 1, 1]
    for cut in range(len(stream)):
        assert read([(1.0, stream[:cut]), (1.0, stream[cut:])], is_chat) == whole
    assert read([(1.0, bytes([byte])) for byte in stream], is_chat) == whole


def test_token_ids_count_where_text_is_held_back() -> None:
    events = [event({"choices": [{"text": "", "token_ids": [7]}]}), *completion_events(["ab"])]
    assert read(timed(events)).chunk_times_s == [1, 2]


def test_without_usage_chunks_are_counted() -> None:
    record = read(timed(completion_events(["a", "b", "c"])))
    assert (record.output_len, record.has_usage, record.prompt_len) == (3, False, 5)


def test_continuous_usage_keeps_the_last() -> None:
    events = [
        event({"choices": [{"text": "a", "finish_reason": None}], "usage": usage_of(5, 1)}),
        event({"choices": [{"text": "bc", "finish_reason": "stop"}], "usage": usage_of(5, 3)}),
    ]
    record = read(timed(events))
    assert (record.is_success, record.output_len) == (True, 3)


def test_an_answer_without_output_succeeds() -> None:
    """A model may end at once: one token, no text."""
    record = read(timed([event({"choices": [{"text": "", "finish_reason": "stop"}]}), DONE]))
    assert record.is_success
    assert (record.ttft_s, record.latency_s, record.tpot_s) == (1, 1, None)


def test_a_bare_done_at_the_end() -> None:
    assert read([(1.0, event({"choices": [{"text": "a"}]}) + b"data: [DONE]")]).is_success


@pytest.mark.parametrize(
    ("pieces", "status", "parts"),
    [
        ([b'{"error": {"message": "too long", "code": 400}}'], 400, ["HTTP 400", "too long"]),
        ([b"<html>\n  bad gateway\n</html>"], 502, ["HTTP 502", "<html> bad gateway"]),
        ([], 503, ["HTTP 503", "empty"]),
        ([json.dumps({"choices": [{"text": "a"}]}).encode()], 200, ["no event"]),
        ([event({"choices": [{"text": "a"}]})], 200, ["without a finish_reason"]),
        ([event({"choices": [{"text": "a"}]}), event({"error": {"message": "engine lost"}}), DONE], 200,
         ["in the stream", "engine lost"]),
        ([b"data: {broken\n\n", DONE], 200, ["no chunk", "{broken"]),
        ([b"data: [1, 2]\n\n", DONE], 200, ["no chunk"]),
        ([DONE], 200, ["no event with choices"]),
    ],
)  # fmt: skip
def test_failures_say_why(pieces: list[bytes], status: int, parts: list[str]) -> None:
    record = read(timed(pieces), status=status)
    assert not record.is_success
    assert "\n" not in record.error
    for part in parts:
        assert part in record.error


def test_error_messages_are_short() -> None:
    assert len(error_message(b"x" * 5000)) == 300
    assert error_message(b'{"error": "plain"}') == "plain"
    assert error_message(b'{"message": "of vLLM", "code": 4}') == "of vLLM"
    assert error_message(b'{"detail": "of FastAPI"}') == "{'detail': 'of FastAPI'}"
