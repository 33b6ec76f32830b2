"""The Responses API with the openai package as users have it, beside what chat answers to the same conversation."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest
from transformers import AutoTokenizer

from manta.cluster.engine.client import QueueFullError
from tests.cluster.doors.test_tools import AUTO, CALL, TEMPLATE, TOOL
from tests.support.door_server import DoorThread
from tests.support.fake_client import FakeClient
from tests.support.small_tokenizers import write_model_folder

FUNCTION: Any = {"type": "function"} | TOOL["function"]  # type: ignore[operator]
THOUGHT = "<think>\nHm, so.\n</think>\n\n"
LOGPROBS: Any = ["message.output_text.logprobs"]


class Door:
    """The SDK, and the fake engine behind the server."""

    def __init__(self, doors: DoorThread, sdk: openai.OpenAI) -> None:
        self.doors, self.sdk, self.engine = doors, sdk, doors.client
        self.tokenizer = doors.service.validator.tokenizer

    def say(self, *texts: str) -> None:
        """What the model answers to the calls that follow; the last text to all others."""
        answers = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        self.engine.model = lambda request: answers.pop(0) if len(answers) > 1 else answers[0]

    def create(self, input: Any = "Sun?", **fields: Any) -> Any:
        return self.sdk.responses.create(model="tiny", input=input, **fields)

    def chat(self, messages: Any, **fields: Any) -> Any:
        return self.sdk.chat.completions.create(model="tiny", messages=messages, **fields)

    def post(self, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.doors.base_url}/v1/responses", json=body, timeout=30)

    def prompt(self, index: int = -1) -> str:
        return self.tokenizer.decode(list(self.engine.submitted[index].prompt_token_ids))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DoorThread]:
    folder = write_model_folder(tmp_path_factory.mktemp("responses"), chat_template=TEMPLATE)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    with DoorThread(FakeClient(), folder, max_model_len=512, reasoning_parser="qwen3", **AUTO) as doors:
        yield doors


@pytest.fixture
def door(server: DoorThread) -> Iterator[Door]:
    server.client.reset()
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as sdk:
        yield Door(server, sdk)


def test_a_text(door: Door) -> None:
    door.say("The quick brown fox 你好 🙂")
    answer = door.create(
        instructions="Be brief.", metadata={"a": "b"}, max_output_tokens=100, temperature=0.5, user="u"
    )
    assert answer.output_text == "The quick brown fox 你好 🙂"
    assert (answer.object, answer.status, answer.model, answer.error) == ("response", "completed", "tiny", None)
    assert (answer.metadata, answer.instructions, answer.temperature) == ({"a": "b"}, "Be brief.", 0.5)
    same = door.chat(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sun?"}],
        max_tokens=100, temperature=0.5,
    )  # fmt: skip
    assert answer.output_text == same.choices[0].message.content
    assert door.prompt(0) == door.prompt(1)
    assert answer.usage.input_tokens == same.usage.prompt_tokens
    assert answer.usage.output_tokens == same.usage.completion_tokens
    assert answer.usage.total_tokens == same.usage.total_tokens
    assert answer.usage.output_tokens_details.reasoning_tokens == 0
    assert door.engine.submitted[0].sampling.model_copy(update={"seed": None}) == door.engine.submitted[
        1
    ].sampling.model_copy(update={"seed": None})


def test_cached_tokens_are_counted(door: Door) -> None:
    door.say("x")
    assert door.create("hello " * 20).usage.input_tokens_details.cached_tokens == 0
    assert door.create("hello " * 20).usage.input_tokens_details.cached_tokens >= 16


@pytest.mark.parametrize("tokens_per_chunk", [1, 3, 1000])
@pytest.mark.parametrize(
    "text", ["Hello you", f"{THOUGHT}Well.\n{CALL}\n{CALL}", f"{THOUGHT}So", CALL, "", "<think>\nOh"]
)
def test_a_stream_tells_what_the_whole_answer_has(door: Door, text: str, tokens_per_chunk: int) -> None:
    door.engine.tokens_per_chunk = tokens_per_chunk
    door.say(text)
    whole = door.create(tools=[FUNCTION])
    events = list(door.create(tools=[FUNCTION], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    final = events[-1].response
    assert _plain(final) == _plain(whole)
    assert final.usage.output_tokens_details == whole.usage.output_tokens_details
    assert _rebuilt(events) == _plain(final)


def _plain(response: Any) -> list[Any]:
    """The output without what is drawn for each answer."""
    return [item.model_dump(exclude_none=True, exclude={"id", "call_id"}) for item in response.output]


def _rebuilt(events: list[Any]) -> list[Any]:
    """The output from its smallest pieces, each of which must fit the event that ends it."""
    texts: dict[int, str] = {}
    items: list[Any] = []
    for event in events:
        kind = event.type.removeprefix("response.")
        if kind == "output_item.added":
            assert event.output_index == len(items)
            assert event.item.status == "in_progress"
            items.append(event.item)
            texts[event.output_index] = ""
        elif kind.endswith(".delta"):
            assert event.item_id == items[-1].id
            texts[event.output_index] += event.delta
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert event.text == texts[event.output_index]
        elif kind == "function_call_arguments.done":
            assert event.arguments == texts[event.output_index]
        elif kind == "output_item.done":
            assert event.item.id == items[event.output_index].id
            items[event.output_index] = event.item
    return _plain(type("Output", (), {"output": items}))


def test_the_helper_of_the_sdk_accumulates_a_stream(door: Door) -> None:
    door.say(f"{THOUGHT}Well.\n{CALL}")
    with door.sdk.responses.stream(model="tiny", input="Sun?", tools=[FUNCTION | {"strict": True}]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == "Well."
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert {"response.reasoning_text.delta", "response.function_call_arguments.delta"} <= set(kinds)


def test_reasoning_is_an_item_and_its_tokens_are_counted(door: Door) -> None:
    door.say(f"{THOUGHT}Yes")
    answer = door.create()
    reasoning, message = answer.output
    assert [part.text for part in reasoning.content] == ["Hm, so."]
    assert [part.text for part in message.content] == ["Yes"]
    tags = door.tokenizer.encode("<think>\nHm, so.\n</think>", add_special_tokens=False)
    for size in (1, 2, 5, 100):
        door.engine.tokens_per_chunk = size
        assert door.create().usage.output_tokens_details.reasoning_tokens == len(tags)


def test_log_probabilities_are_those_of_chat(door: Door) -> None:
    door.say("Hello 你好 you")
    messages = [{"role": "user", "content": "Sun?"}]
    same = door.chat(messages, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    for size in (1, 3, 100):
        door.engine.tokens_per_chunk = size
        (message,) = door.create(include=LOGPROBS, top_logprobs=2).output
        told = [one.model_dump() for one in message.content[0].logprobs]
        assert told == [one.model_dump() for one in same]
        events = list(door.create(include=LOGPROBS, top_logprobs=2, stream=True))
        deltas = [one.token for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
        assert deltas == [one.token for one in same]


def test_log_probabilities_beside_reasoning_and_calls_are_of_what_is_said(door: Door) -> None:
    said = "Well then"
    names = [door.tokenizer.token_text(t) for t in door.tokenizer.encode(said, add_special_tokens=False)]
    for size in (1, 2, 7, 100):
        door.engine.tokens_per_chunk = size
        door.say(f"{THOUGHT}{said}\n{CALL}")
        answer = door.create(tools=[FUNCTION], include=LOGPROBS)
        told = [one.token for one in answer.output[1].content[0].logprobs]
        assert told[: len(names)] == names, size
        assert "".join(told).rstrip() == said


def test_the_length_limit_makes_an_answer_incomplete(door: Door) -> None:
    door.say("The quick brown fox")
    answer = door.create(max_output_tokens=2)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.output[0].status == "incomplete"
    *_, last = door.create(max_output_tokens=2, stream=True)
    assert (last.type, last.response.status) == ("response.incomplete", "incomplete")


class Person(pydantic.BaseModel):
    name: str
    age: int


def test_parse_with_a_class(door: Door) -> None:
    door.say('{"name": "Ada", "age": 36}')
    answer = door.sdk.responses.parse(model="tiny", input="Who?", text_format=Person)
    assert answer.output_parsed == Person(name="Ada", age=36)
    asked = door.engine.submitted[-1].sampling.structured_outputs
    assert asked is not None
    assert json.loads(asked.grammar_text()[1])["required"] == ["name", "age"]


def test_a_round_of_a_function(door: Door) -> None:
    door.say(f"{THOUGHT}Let me see.\n{CALL}", "It is sunny.")
    items: list[Any] = [{"role": "user", "content": "Sun?"}]
    answer = door.create(items, tools=[FUNCTION])
    call = answer.output[-1]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Köln"})
    items += answer.output
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"})
    assert door.create(items, tools=[FUNCTION]).output_text == "It is sunny."
    with_items = door.prompt()
    more = [{"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"}]
    door.create(more, tools=[FUNCTION], previous_response_id=answer.id)
    assert door.prompt() == with_items
    door.say(f"{THOUGHT}Let me see.\n{CALL}", "It is sunny.")
    messages: list[Any] = [{"role": "user", "content": "Sun?"}]
    message = door.chat(messages, tools=[TOOL]).choices[0].message.model_dump(exclude_none=True)
    message["tool_calls"][0]["id"] = call.call_id
    door.chat(
        [*messages, message, {"role": "tool", "tool_call_id": call.call_id, "content": "21 degrees"}], tools=[TOOL]
    )
    assert door.prompt() == with_items


def test_a_call_that_is_none_is_text(door: Door) -> None:
    door.say('Well. <tool_call>{"name": "weather", "arguments": {"city": oops')
    answer = door.create(tools=[FUNCTION])
    assert answer.output_text == 'Well. <tool_call>{"name": "weather", "arguments": {"city": oops'
    assert [item.type for item in answer.output] == ["message"]
    *_, last = door.create(tools=[FUNCTION], stream=True)
    # What was told of the call cannot be taken back, as in a stream of chat.
    told = [(item.type, item.status) for item in last.response.output]
    assert told == [("message", "completed"), ("function_call", "incomplete"), ("message", "completed")]


@pytest.mark.parametrize(
    ("choice", "chat_choice"),
    [("required", "required"), ("none", "none"),
     ({"type": "function", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}),
     ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]}, "auto")],
)  # fmt: skip
def test_choices_of_tools_are_those_of_chat(door: Door, choice: Any, chat_choice: Any) -> None:
    door.say('[{"name": "weather", "parameters": {"city": "Bonn"}}]')
    answer = door.create(tools=[FUNCTION], tool_choice=choice)
    same = door.chat([{"role": "user", "content": "Sun?"}], tools=[TOOL], tool_choice=chat_choice).choices[0].message
    calls = [item.arguments for item in answer.output if item.type == "function_call"]
    assert calls == [call.function.arguments for call in same.tool_calls or ()]
    assert door.prompt(0) == door.prompt(1)
    constraints = [request.sampling.structured_outputs for request in door.engine.submitted]
    assert constraints[0] == constraints[1]


def test_a_conversation_goes_on_without_its_instructions(door: Door) -> None:
    door.say("one", "two", "three")
    first = door.create("a", instructions="Rhyme.")
    second = door.create("b", previous_response_id=first.id)
    third = door.create("c", previous_response_id=second.id)
    assert third.previous_response_id == second.id
    messages = [
        {"role": ("user", "assistant")[index % 2], "content": text}
        for index, text in enumerate(["a", "one", "b", "two", "c"])
    ]
    door.chat(messages)
    assert door.prompt(2) == door.prompt(3)
    items = door.sdk.responses.input_items.list(third.id).data
    assert [part.text for item in items for part in item.content] == ["c"]  # type: ignore[union-attr]


def test_items_of_an_input_are_listed_in_pages(door: Door) -> None:
    door.say("x")
    answer = door.create([{"role": "user", "content": text} for text in "abcde"])
    listed = [item.content[0].text for item in door.sdk.responses.input_items.list(answer.id, limit=2, order="asc")]  # type: ignore[union-attr]
    assert listed == list("abcde")
    listed = [item.content[0].text for item in door.sdk.responses.input_items.list(answer.id, limit=3)]  # type: ignore[union-attr]
    assert listed == list("edcba")


def test_truncation_drops_the_oldest_messages(door: Door) -> None:
    door.say("x")
    turns = [
        {"role": role, "content": f"{index} hello hello hello"} for index in range(60) for role in ("user", "assistant")
    ]
    items = [{"role": "system", "content": "keep"}, *turns, {"role": "user", "content": "last"}]
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512"):
        door.create(items)
    door.create(items, truncation="auto", max_output_tokens=50)
    prompt = door.prompt()
    assert prompt.startswith("<|system|>keep")
    assert "last" in prompt
    kept = [number for number in range(60) if f">{number} hello" in prompt]
    assert kept == list(range(kept[0], 60))
    fitting = len(door.engine.submitted[-1].prompt_token_ids)
    one_more = [items[0], *turns[2 * kept[0] - 1 :], items[-1]]
    if prompt.count("hello hello hello") == len(turns[2 * kept[0] :]):
        with pytest.raises(openai.BadRequestError):
            door.create(one_more, max_output_tokens=50)
    assert 400 < fitting <= 462


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"input": None}, "input", "required"),
    ({"input": []}, "input", "at least one"),
    ({"input": 3}, "input", "string or a list"),
    ({"input": [{"role": "user", "content": "x"}] * 1100}, "input", "1100 items"),
    ({"input": [{"role": "user", "content": "x"}] * 1000}, "input", "maximum context length"),
    ({"include": [{}]}, "include", "{}"),
    ({"input": ["x"]}, "input[0]", "object"),
    ({"input": [{"role": "user"}]}, "input[0].content", "required"),
    ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role", "wizard"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]", "text only"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", "string"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "item_reference"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id", "required"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": {}, "call_id": "c"}]}, "input[0].arguments", "str"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{", "call_id": "c"}]}, None, "no JSON"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0].call_id", "before it"),
    ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input[0].encrypted_content", "leave"),
    ({"input": [{"type": "reasoning", "summary": "x"}]}, "input[0].summary", "list"),
    ({"previous_response_id": "resp_0000"}, "previous_response_id", "no response"),
    ({"previous_response_id": 3}, "previous_response_id", "string"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "not supported"),
    ({"tools": [TOOL]}, "tools[0].function", "as in chat"),
    ({"tools": [{"type": "function", "name": ""}]}, "tools[0].name", "text"),
    ({"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice", "not in tools"),
    ({"tools": [FUNCTION], "tool_choice": {"type": "file_search"}}, "tool_choice", "not supported"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type", "xml"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "object"),
    ({"text": {"fromat": {}}}, "text.fromat", "'format'"),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "not supported"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "huge"),
    ({"reasoning": {"effort": "low"}}, "reasoning.effort", "template"),
    ({"top_logprobs": 2}, "top_logprobs", "include"),
    ({"include": ["everything"]}, "include", "everything"),
    ({"truncation": "yes"}, "truncation", "auto"),
    ({"metadata": {"a": 1}}, "metadata", "strings"),
    ({"max_output_tokens": 0}, "max_output_tokens", "between"),
    ({"max_output_tokens": 600}, "max_output_tokens", "context"),
    ({"temperature": -1}, "temperature", ""),
    ({"background": True, "store": False}, "background", "store"),
    ({"stream_options": {}}, "stream_options", "stream"),
    ({"conversation": "c"}, "conversation", "not supported"),
    ({"prompt": {"id": "p"}}, "prompt", "not supported"),
    ({"messages": []}, "messages", "input"),
    ({"max_tokens": 3}, "max_tokens", "use max_output_tokens"),
    ({"n": 2}, "n", "not supported"),
    ({"response_format": {"type": "text"}}, "response_format", "text.format"),
    ({"temprature": 1}, "temprature", "'temperature'"),
    ({"guided_json": {}}, "guided_json", "structured_outputs"),
]


@pytest.mark.parametrize(("change", "param", "words"), BAD, ids=[json.dumps(change)[:60] for change, _, _ in BAD])
def test_bad_requests_name_the_field(door: Door, change: dict[str, Any], param: str | None, words: str) -> None:
    answer = door.post(**({"model": "tiny", "input": "Sun?"} | change))
    error = answer.json()["error"]
    assert answer.status_code == (404 if change.get("previous_response_id") == "resp_0000" else 400), error
    assert words in error["message"]
    if param is not None:
        assert error["param"] == param
    assert not door.engine.submitted


def test_what_changes_nothing_is_taken(door: Door) -> None:
    door.say("x")
    answer = door.create(
        service_tier="flex", safety_identifier="s", prompt_cache_key="k", max_tool_calls=3, user="u",
        include=["reasoning.encrypted_content"], text={"verbosity": "medium"}, reasoning={"summary": "auto"},
        extra_body={"conversation": None, "n": 1},
    )  # fmt: skip
    assert (answer.output_text, answer.safety_identifier, answer.max_tool_calls) == ("x", "s", 3)


def test_sampling_beyond_openais_fields(door: Door) -> None:
    door.say("one two END three")
    extra = {"top_k": 5, "min_p": 0.1, "seed": 7, "stop": ["END"], "cache_salt": "s", "priority": 2, "min_tokens": 1}
    assert door.create(extra_body=extra).output_text == "one two "
    (request,) = door.engine.submitted
    sampling = request.sampling
    assert (sampling.top_k, sampling.min_p, sampling.seed, sampling.stop) == (5, 0.1, 7, ("END",))
    assert (request.cache_salt, request.priority) == ("s", 2)


def test_errors_of_the_engine(door: Door) -> None:
    door.say("one two three four")
    door.engine.refusal = QueueFullError("the queue is full", 2.0)
    for fields in ({}, {"stream": True}, {"background": True}, {"background": True, "stream": True}):
        with pytest.raises(openai.InternalServerError, match="the queue is full") as caught:
            door.create(**fields)
        assert caught.value.response.headers["retry-after"] == "2"
    door.engine.refusal, door.engine.lost_after = None, 2
    with pytest.raises(openai.InternalServerError, match="connection to the engine broke"):
        door.create()
    *_, last = door.create(stream=True)
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert "connection to the engine broke" in last.response.error.message
    kept = door.sdk.responses.retrieve(last.response.id)
    assert kept == last.response
