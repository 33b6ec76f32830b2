"""Chat over gRPC beside the same call over HTTP: what the engine is asked, what is answered, what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from transformers import AutoTokenizer

from manta.protos import inference_pb2 as pb
from manta.protos import inference_pb2_grpc as pb_grpc
from tests.cluster.doors.test_tools import AUTO, CALL, TEMPLATE, TOOL, USER, Chat, serving
from tests.support.rpc_requests import chat_request, error_of
from tests.support.small_tokenizers import write_model_folder

NAMED = {"type": "function", "function": {"name": "weather"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
HISTORY = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "text", "text": "Sun?"}, {"type": "text", "text": "Rain?"}], "name": "Eva"},
    {
        "role": "assistant",
        "reasoning": "Hm.",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": 1}'}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "21 degrees"},
]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    folder: Path = write_model_folder(tmp_path_factory.mktemp("rpc_chat"), chat_template=TEMPLATE)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    with serving(folder, **AUTO, reasoning_parser="qwen3") as chat:
        yield chat


@pytest.fixture(scope="module")
def stub(chat: Chat) -> Iterator[pb_grpc.InferenceStub]:
    with grpc.insecure_channel(chat.doors.grpc_address) as channel:
        yield pb_grpc.InferenceStub(channel)


@pytest.fixture
def fresh(chat: Chat) -> Chat:
    chat.doors.client.reset()
    return chat


def over_http(chat: Chat, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{chat.doors.base_url}/v1/chat/completions", json=body, timeout=20)


def told_by_http(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice["message"]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    logprobs = choice["logprobs"] and [
        (one["logprob"], [other["logprob"] for other in one["top_logprobs"]]) for one in choice["logprobs"]["content"]
    ]
    return {
        "content": message["content"] or "",
        "reasoning": message.get("reasoning", ""),
        "calls": calls,
        "finish_reason": choice["finish_reason"],
        "stop_reason": choice["stop_reason"],
        "token_ids": choice["token_ids"],
        "logprobs": logprobs or [],
    }


def told_by_grpc(responses: list[pb.ChatResponse], index: int) -> dict[str, Any]:
    """What the responses for one answer join to."""
    mine = [response for response in responses if response.index == index]
    calls: dict[int, list[str]] = {}
    for response in mine:
        for call in response.tool_calls:
            assert bool(call.id) == (call.index not in calls)
            calls.setdefault(call.index, [call.name, ""])[1] += call.arguments
    (last,) = [response for response in mine if response.finish_reason]
    assert last is mine[-1]
    return {
        "content": "".join(response.content for response in mine),
        "reasoning": "".join(response.reasoning for response in mine),
        "calls": [tuple(call) for call in calls.values()],
        "finish_reason": last.finish_reason,
        "stop_reason": getattr(last, last.WhichOneof("stop_reason") or "", None),
        "token_ids": [token for response in mine for token in response.token_ids],
        "logprobs": [(one.logprob, list(one.top_logprobs)) for response in mine for one in response.logprobs],
    }


ANSWERS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "content": ("Hello, you!", {}),
    "thinking": ("<think>\nHm.\n</think>\n\nWell.", {}),
    "untold thinking": ("<think>\nHm.\n</think>\n\nWell.", {"include_reasoning": False}),
    "calls": (f"<think>Hm.</think>Look.\n{CALL}\n{CALL.replace('Köln', 'Bonn')}", {"tools": [TOOL]}),
    "one call": (f"{CALL}\n{CALL}", {"tools": [TOOL], "parallel_tool_calls": False}),
    "no calls": (CALL, {"tools": [TOOL], "tool_choice": "none"}),
    "a named call": ('{"city": "Köln"}', {"tools": [TOOL], "tool_choice": NAMED}),
    "required calls": ('[{"name": "weather", "parameters": {}}]', {"tools": [TOOL], "tool_choice": "required"}),
    "a stop string": ("Hello, you!", {"stop": [" you"], "include_stop_str_in_output": True}),
    "samples": (None, {"n": 3, "seed": 5, "max_tokens": 9, "temperature": 0.7}),
    "log-probabilities": ("Hello, <think>you!", {"logprobs": True, "top_logprobs": 3}),
    "best_of": (None, {"n": 2, "best_of": 4, "seed": 1, "max_tokens": 5}),
    "beams": (None, {"n": 2, "best_of": 3, "use_beam_search": True, "early_stopping": "never", "max_tokens": 5}),
}


@pytest.mark.parametrize(("text", "fields"), ANSWERS.values(), ids=ANSWERS.keys())
@pytest.mark.parametrize("tokens_per_chunk", [1, 1000])
def test_answers_are_those_of_http(
    fresh: Chat, stub: pb_grpc.InferenceStub, text: str | None, fields: dict[str, Any], tokens_per_chunk: int
) -> None:
    fresh.doors.client.tokens_per_chunk = tokens_per_chunk
    if text is not None:
        fresh.say(text)
    body = {"messages": [USER], "return_token_ids": True, "temperature": 0.0} | fields
    answer = over_http(fresh, body).json()
    expected = [told_by_http(choice) for choice in answer["choices"]]
    for stream in (False, True):
        responses = list(stub.Chat(chat_request(body, stream=stream)))
        told = [told_by_grpc(responses, index) for index in range(len(expected))]
        assert told == expected
        assert len(responses) >= len(expected)
        assert stream or len(responses) == len(expected)
        assert [response.HasField("usage") for response in responses] == [False] * (len(responses) - 1) + [True]
        usage = responses[-1].usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (
            answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"],
        )  # fmt: skip
        assert [list(r.prompt_token_ids) for r in responses if r.prompt_token_ids] == [
            answer["prompt_token_ids"]
        ] * len(expected)


def test_a_call_streams_while_it_is_written(fresh: Chat, stub: pb_grpc.InferenceStub) -> None:
    fresh.say(CALL)
    responses = list(stub.Chat(chat_request({"messages": [USER], "tools": [TOOL]}, stream=True)))
    pieces = [response for response in responses if response.tool_calls]
    assert len(pieces) > 5
    assert pieces[0].tool_calls[0].name == "weather"
    assert json.loads("".join(piece.tool_calls[0].arguments for piece in pieces)) == {"city": "Köln"}
    assert not any(response.token_ids or response.prompt_token_ids for response in responses)


ASKED: dict[str, dict[str, Any]] = {
    "a history": {"messages": HISTORY},
    "tools": {"messages": [USER], "tools": [TOOL, {"type": "function", "function": {"name": "stop"}}]},
    "a forced call": {"messages": [USER], "tools": [TOOL], "tool_choice": NAMED},
    "calls": {"messages": [USER], "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
    "kwargs": {"messages": [USER], "chat_template_kwargs": {"thinks": True}},
    "no cue": {"messages": [USER], "add_generation_prompt": False, "add_special_tokens": True},
    "continued": {"messages": [USER, {"role": "assistant", "content": "The sun"}], "continue_final_message": True},
    "json_object": {"messages": [USER], "response_format": {"type": "json_object"}},
    "json_schema": {
        "messages": [USER],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
    },
    "text": {"messages": [USER], "response_format": {"type": "text"}},
    "structured_outputs": {"messages": [USER], "structured_outputs": {"choice": ["a", "b"]}},
    "numbers": {"messages": [USER], "temperature": 0.7, "top_p": 0.1, "min_p": 0.3, "logit_bias": {9: 0.2}},
    "others": {"messages": [USER], "max_tokens": 3, "priority": -4, "cache_salt": "s", "prompt_logprobs": 2},
}


@pytest.mark.parametrize("body", ASKED.values(), ids=ASKED.keys())
def test_the_engine_is_asked_the_same(fresh: Chat, stub: pb_grpc.InferenceStub, body: dict[str, Any]) -> None:
    body = {"seed": 3, "max_tokens": 2} | body
    response = over_http(fresh, body | ({"logit_bias": {"9": 0.2}} if "logit_bias" in body else {}))
    assert response.status_code == 200, response.text
    list(stub.Chat(chat_request(body)))
    first, second = fresh.doors.client.submitted
    assert second.sampling == first.sampling
    for name in ("prompt_token_ids", "priority", "cache_salt", "tenant", "beams", "bad_words"):
        assert getattr(second, name) == getattr(first, name), name


def call_with(**function: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "tool_calls": [{"id": "1", "function": function}]}]


REFUSED: dict[str, dict[str, Any]] = {
    "no message": {"messages": []},
    "no role": {"messages": [{"role": "", "content": "x"}]},
    "no content": {"messages": [{"role": "user"}]},
    "another model": {"messages": [USER], "model": "other"},
    "arguments": {"messages": call_with(name="f", arguments="{")},
    "arguments of a list": {"messages": call_with(name="f", arguments="[1]")},
    "a call without function": {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
    "no name": {"messages": [USER], "tools": [{"type": "function", "function": {"name": ""}}]},
    "no function": {"messages": [USER], "tools": [{"type": "function"}]},
    "another type": {"messages": [USER], "tools": [{"type": "web"}]},
    "parameters": {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}]},
    "another function": {
        "messages": [USER], "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}},
    },
    "required without tools": {"messages": [USER], "tool_choice": "required"},
    "two cues": {"messages": [USER], "add_generation_prompt": True, "continue_final_message": True},
    "kwargs": {"messages": [USER], "chat_template_kwargs": [1]},
    "reserved kwargs": {"messages": [USER], "chat_template_kwargs": {"tokenize": True}},
    "a format": {"messages": [USER], "response_format": {"type": "xml"}},
    "no schema": {"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
    "no schema's name": {"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
    "no json_schema": {"messages": [USER], "response_format": {"type": "json_schema"}},
    "a schema": {
        "messages": [USER],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}},
    },
    "two constraints": {
        "messages": [USER],
        "response_format": {"type": "json_object"},
        "structured_outputs": {"regex": "a"},
    },
    "a forced call and a constraint": {
        "messages": [USER], "tools": [TOOL], "tool_choice": NAMED, "structured_outputs": {"regex": "a"},
    },
    "sampling": {"messages": [USER], "top_p": 1.1},
    "too many tokens": {"messages": [USER], "max_tokens": 9999},
    "too long": {"messages": [{"role": "user", "content": "x " * 2000}]},
    "n": {"messages": [USER], "n": 129},
    "best_of": {"messages": [USER], "n": 3, "best_of": 2},
    "no beams": {"messages": [USER], "length_penalty": 0.3},
    "beams with a stop": {"messages": [USER], "use_beam_search": True, "stop": ["a"]},
    "a request id": {"messages": [USER], "request_id": "two words"},
    "a salt": {"messages": [USER], "cache_salt": "s" * 1025},
}  # fmt: skip


@pytest.mark.parametrize("body", REFUSED.values(), ids=REFUSED.keys())
def test_refusals_are_those_of_http(fresh: Chat, stub: pb_grpc.InferenceStub, body: dict[str, Any]) -> None:
    response = over_http(fresh, body)
    assert response.status_code in (400, 404)
    error = response.json()["error"]
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Chat(chat_request(body)))
    code = "NOT_FOUND" if response.status_code == 404 else "INVALID_ARGUMENT"
    assert error_of(caught.value) == (code, error["param"], error["message"])
    assert not fresh.doors.client.submitted


BAD_TEXTS = {
    "tools[0].function.parameters": {"tools": [{"function": {"name": "f", "parameters": "{"}}]},
    "chat_template_kwargs": {"chat_template_kwargs": "{'a': 1}"},
    "response_format.json_schema.schema": {"response_format": {"json_schema": {"schema": "[" * 5000}}},
}


def test_an_empty_part_is_named_as_the_message_has_it(stub: pb_grpc.InferenceStub) -> None:
    request = pb.ChatRequest(messages=[{"role": "user", "parts": {"parts": [{"text": "x"}, {}]}}])
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Chat(request))
    param = "messages[0].parts.parts[1].text"
    assert error_of(caught.value) == ("INVALID_ARGUMENT", param, f"{param} is required")


@pytest.mark.parametrize(("param", "fields"), BAD_TEXTS.items(), ids=BAD_TEXTS.keys())
def test_texts_must_be_json(stub: pb_grpc.InferenceStub, param: str, fields: dict[str, Any]) -> None:
    request = pb.ChatRequest(messages=[{"role": "user", "content": "x"}], **fields)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Chat(request))
    code, at, message = error_of(caught.value)
    assert (code, at) == ("INVALID_ARGUMENT", param)
    assert message.startswith(f"{param} is not valid JSON: ")


def test_unknown_values_of_enums(stub: pb_grpc.InferenceStub) -> None:
    message = {"role": "user", "content": "x"}
    for request, param in (
        (pb.ChatRequest(messages=[message], tool_choice=pb.ToolChoice(mode=7)), "tool_choice"),  # type: ignore[arg-type]
        (pb.ChatRequest(messages=[message], sampling={"early_stopping": 7}), "early_stopping"),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Chat(request))
        assert error_of(caught.value)[:2] == ("INVALID_ARGUMENT", param)
        assert "7 is not one of the " in caught.value.details()


def test_abort_and_cancel(fresh: Chat, stub: pb_grpc.InferenceStub) -> None:
    fresh.doors.client.hang_after = 2
    answers = stub.Chat(chat_request({"messages": [USER], "request_id": "mine", "ignore_eos": True}, stream=True))
    next(answers)
    assert stub.Abort(pb.AbortRequest(request_id="mine")).found
    assert list(answers)[-1].finish_reason == "abort"
    assert fresh.doors.client.aborted == ["mine"]
