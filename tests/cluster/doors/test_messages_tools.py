"""Tools and thinking of the Messages API with the anthropic package, beside chat calls of the same conversation."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from transformers import AutoTokenizer

from manta.cluster.doors.messages_blocks import chat_messages
from tests.cluster.doors.test_tools import AUTO, CALL, TEMPLATE, TOOL
from tests.support.door_server import DoorThread
from tests.support.fake_client import FakeClient
from tests.support.small_tokenizers import write_model_folder

SWITCH = "{% if enable_thinking is defined %}[thinks {{ enable_thinking }}]{% endif %}"
WEATHER: Any = {
    "name": "weather",
    "description": "of a city",
    "input_schema": TOOL["function"]["parameters"],  # type: ignore[index]
}
SUN: Any = {"role": "user", "content": "Sun?"}
THINKS: Any = {"type": "enabled", "budget_tokens": 50}
THOUGHT = "<think>\nHm, so.\n</think>\n\n"


class Door:
    """The SDK, and the fake engine behind the server."""

    def __init__(self, doors: DoorThread, sdk: anthropic.Anthropic) -> None:
        self.doors, self.sdk, self.engine = doors, sdk, doors.client
        self.tokenizer = doors.service.validator.tokenizer

    def say(self, text: str) -> None:
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        self.engine.model = lambda request: tokens

    def create(self, *messages: Any, **fields: Any) -> Any:
        return self.sdk.messages.create(
            **({"model": "tiny", "max_tokens": 300, "messages": messages or (SUN,)} | fields)
        )

    def stream(self, **fields: Any) -> tuple[Any, list[Any]]:
        """The message that the SDK accumulates, and the events."""
        with self.sdk.messages.stream(model="tiny", messages=[SUN], **({"max_tokens": 300} | fields)) as stream:
            events = list(stream)
            return stream.get_final_message(), events

    def chat_prompt(self, *messages: Any, **fields: Any) -> str:
        """The prompt that a chat call of these messages has."""
        body = {"messages": messages, "max_tokens": 1} | fields
        httpx.post(f"{self.doors.base_url}/v1/chat/completions", json=body, timeout=30).raise_for_status()
        return self.prompt()

    def prompt(self) -> str:
        return self.tokenizer.decode(list(self.engine.submitted[-1].prompt_token_ids))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model_folder(tmp_path_factory.mktemp("messages"), chat_template=SWITCH + TEMPLATE)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[DoorThread]:
    with DoorThread(FakeClient(), folder, max_model_len=1024, reasoning_parser="qwen3", **AUTO) as doors:
        yield doors


@pytest.fixture
def door(server: DoorThread) -> Iterator[Door]:
    server.client.reset()
    with anthropic.Anthropic(base_url=server.base_url, api_key="none", max_retries=0) as sdk:
        yield Door(server, sdk)


def test_a_call_of_a_tool(door: Door) -> None:
    door.say(f"Let me see.\n{CALL}")
    message = door.create(tools=[WEATHER])
    text, call = message.content
    assert (text.type, text.text) == ("text", "Let me see.")
    assert (call.type, call.name, call.input) == ("tool_use", "weather", {"city": "Köln"})
    assert (message.stop_reason, message.stop_sequence) == ("tool_use", None)
    asked = door.prompt()
    assert asked == door.chat_prompt(SUN, tools=[TOOL], chat_template_kwargs={"enable_thinking": False})


@pytest.mark.parametrize("tokens_per_chunk", [1, 4, 1000])
def test_a_stream_accumulates_to_the_same(door: Door, tokens_per_chunk: int) -> None:
    door.engine.tokens_per_chunk = tokens_per_chunk
    door.say(f"{THOUGHT}Well.\n{CALL}\n{CALL.replace('Köln', 'Bonn')}")
    whole = door.create(tools=[WEATHER], thinking=THINKS)
    streamed, events = door.stream(tools=[WEATHER], thinking=THINKS)
    # What parses the pieces of an input in the SDK leaves them in the block.
    keys = ("type", "text", "thinking", "signature", "name", "input")
    plain = [
        [{key: value for key, value in block.model_dump().items() if key in keys} for block in message.content]
        for message in (whole, streamed)
    ]
    assert plain[0] == plain[1]
    assert [block["type"] for block in plain[0]] == ["thinking", "text", "tool_use", "tool_use"]
    assert (whole.stop_reason, whole.usage.output_tokens) == (streamed.stop_reason, streamed.usage.output_tokens)
    if tokens_per_chunk == 1:
        pieces = [event for event in events if event.type == "input_json"]
        assert len(pieces) > 8


def test_a_round_of_a_tool(door: Door) -> None:
    door.say(f"{THOUGHT}Let me see.\n{CALL}")
    answer = door.create(tools=[WEATHER], thinking=THINKS)
    call = answer.content[-1]
    results = [
        {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "21 degrees"}]},
        {"type": "text", "text": "And now?"},
    ]
    said_so = {"role": "assistant", "content": answer.content}
    door.create(SUN, said_so, {"role": "user", "content": results}, tools=[WEATHER], thinking=THINKS)
    asked = door.prompt()
    function = {"name": "weather", "arguments": '{"city": "Köln"}'}
    said = {"role": "assistant", "content": "Let me see.", "reasoning_content": "Hm, so."}
    said |= {"tool_calls": [{"id": call.id, "type": "function", "function": function}]}
    told = {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}
    more = {"role": "user", "content": "And now?"}
    assert asked == door.chat_prompt(
        SUN, said, told, more, tools=[TOOL], chat_template_kwargs={"enable_thinking": True}
    )
    results[0] |= {"is_error": True, "content": "no such city"}
    door.create(SUN, said_so, {"role": "user", "content": results}, tools=[WEATHER])
    assert "Error: no such city" in door.prompt()


@pytest.mark.parametrize(
    ("choice", "chat_choice"),
    [
        ({"type": "any"}, "required"),
        ({"type": "tool", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}),
        ({"type": "none"}, "none"),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto"),
    ],
)
def test_choices_are_those_of_chat(door: Door, choice: Any, chat_choice: Any) -> None:
    texts = {"any": '[{"name": "weather", "parameters": {"city": "Bonn"}}]', "tool": '{"city": "Bonn"}'}
    door.say(texts.get(choice["type"], f"{CALL}{CALL}"))
    message = door.create(tools=[WEATHER], tool_choice=choice)
    kinds = [block.type for block in message.content]
    assert kinds == (["text"] if choice["type"] == "none" else ["tool_use"])
    assert message.stop_reason == ("end_turn" if choice["type"] == "none" else "tool_use")
    door.chat_prompt(SUN, tools=[TOOL], tool_choice=chat_choice)
    first, second = (request.sampling.structured_outputs for request in door.engine.submitted)
    assert first == second


def test_thinking(door: Door) -> None:
    door.say(f"{THOUGHT}Yes")
    message = door.create(thinking=THINKS)
    thinking, text = message.content
    assert (thinking.type, thinking.thinking, text.text) == ("thinking", "Hm, so.", "Yes")
    assert thinking.signature
    tags = door.tokenizer.encode("<think>\nHm, so.\n</think>", add_special_tokens=False)
    assert message.usage.output_tokens_details.thinking_tokens == len(tags)
    assert "[thinks True]" in door.prompt()
    streamed, events = door.stream(thinking={"type": "adaptive"})
    assert [block.type for block in streamed.content] == ["thinking", "text"]
    assert "".join(event.thinking for event in events if event.type == "thinking") == "Hm, so."
    hidden = door.create(thinking=THINKS | {"display": "omitted"})
    told = [(block.type, getattr(block, "thinking", None)) for block in hidden.content]
    assert told == [("thinking", ""), ("text", None)]


@pytest.mark.parametrize("fields", [{}, {"thinking": {"type": "disabled"}}])
def test_thinking_that_is_not_asked_for_is_switched_off_and_not_told(door: Door, fields: Any) -> None:
    door.say(f"{THOUGHT}Yes")
    assert [block.type for block in door.create(**fields).content] == ["text"]
    assert "[thinks False]" in door.prompt()
    assert [block.type for block in door.stream(**fields)[0].content] == ["text"]


def test_what_looks_like_a_call_and_is_none_is_text(door: Door) -> None:
    door.say('<tool_call>{"name": "weather", "arguments": {"city": "Kö')
    message = door.create(tools=[WEATHER])
    assert [block.type for block in message.content] == ["text"]
    assert message.stop_reason == "end_turn"
    streamed, _ = door.stream(tools=[WEATHER])
    assert streamed.stop_reason == "end_turn"


def test_answers_of_a_schema(door: Door) -> None:
    door.say('{"a": 1}')
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    door.create(output_config={"format": {"type": "json_schema", "schema": schema}, "effort": "low"})
    constraint = door.engine.submitted[-1].sampling.structured_outputs
    assert constraint is not None
    assert json.loads(constraint.grammar_text()[1]) == schema


def test_tools_count_in_a_prompt(door: Door) -> None:
    count = door.sdk.messages.count_tokens(model="tiny", messages=[SUN], tools=[WEATHER], thinking=THINKS).input_tokens
    door.create(tools=[WEATHER], thinking=THINKS)
    assert count == len(door.engine.submitted[-1].prompt_token_ids)


def call_of(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}} | fields]}


def result_of(**fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"} | fields]}


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": {}}, "tools must be a list"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "not supported"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tools": [WEATHER | {"name": ""}]}, "tools[0].name"),
    ({"tools": [WEATHER | {"input_shema": {}}]}, "'input_schema'"),
    ({"tools": [WEATHER | {"defer_loading": True}]}, "defer_loading"),
    ({"tool_choice": {"type": "any"}}, "needs tools"),
    ({"tool_choice": {"type": []}}, "tool_choice.type"),
    ({"messages": [SUN] * 3000}, "3000 messages cannot fit"),
    ({"tools": [WEATHER], "tool_choice": "auto"}, "tool_choice.type"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "g"}}, "not in tools"),
    ({"tools": [WEATHER], "tool_choice": {"type": "auto", "parallel": False}}, "parallel"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 100}}, "below max_tokens=100"),
    ({"thinking": THINKS | {"budget": 3}}, "'budget_tokens'"),
    ({"thinking": THINKS, "tools": [WEATHER], "tool_choice": {"type": "any"}}, "does not go with"),
    ({"output_config": {"effort": "huge"}}, "output_config.effort"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "text only"),
    ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, "possible here"),
    ({"messages": [SUN, call_of(), result_of(content=[IMAGE])]}, "messages[2].content[0].content[0]"),
    ({"messages": [SUN, result_of()]}, "messages[1].content[0].tool_use_id"),
    ({"messages": [SUN, call_of(id=3), result_of()]}, "messages[1].content[0].id"),
    ({"messages": [SUN, call_of(input="{}"), result_of()]}, "messages[1].content[0].input"),
    ({"messages": [SUN, call_of()]}, "tool_result"),
    ({"messages": [SUN, {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}, SUN]}, "leave"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[json.dumps(change)[:70] for change, _ in BAD])
def test_bad_requests_name_the_field(door: Door, change: dict[str, Any], words: str) -> None:
    body = {"model": "tiny", "max_tokens": 100, "messages": [SUN]} | change
    answer = httpx.post(f"{door.doors.base_url}/v1/messages", json=body, timeout=30)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]
    assert not door.engine.submitted


def test_servers_without_the_flags_say_so(folder: Path) -> None:
    with (
        DoorThread(FakeClient(), folder) as doors,
        anthropic.Anthropic(base_url=doors.base_url, api_key="none", max_retries=0) as sdk,
    ):
        door = Door(doors, sdk)
        with pytest.raises(anthropic.BadRequestError, match="--enable-auto-tool-choice"):
            door.create(tools=[WEATHER])
        with pytest.raises(anthropic.BadRequestError, match="--reasoning-parser"):
            door.create(thinking=THINKS)
        door.say("<think>x</think>y")
        assert door.create(max_tokens=20).content[0].text == "xy"  # the tags are special tokens


def test_the_example_of_the_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[3] / "docs" / "messages.md").read_text()
    (source,) = re.findall(r"```python\n(import anthropic.*?)```", page, re.DOTALL)
    with DoorThread(FakeClient(), folder, max_model_len=4096, reasoning_parser="qwen3", **AUTO) as doors:
        tokenizer = doors.service.validator.tokenizer
        call = CALL.replace("Köln", "Bonn")
        texts = [tokenizer.encode(text, add_special_tokens=False) for text in (THOUGHT + call, "It is sunny.")]

        def model(request: Any) -> list[int]:
            return texts["Bonn: sunny" in tokenizer.decode(list(request.prompt_token_ids))]

        doors.client.model = model
        source = source.replace("http://localhost:8000", doors.base_url).replace("Qwen/Qwen3-1.7B", "tiny")
        exec(compile(source, "messages.md", "exec"), {})
    assert capsys.readouterr().out == "It is sunny.\n"


def test_blocks_of_a_turn_are_joined_between_results() -> None:
    """A million of them, too: copied for each that follows, they would hold up the frontend for minutes."""
    text, result = {"type": "text", "text": "x"}, {"type": "tool_result", "tool_use_id": "t", "content": "r"}
    call = {"type": "tool_use", "id": "t", "name": "n", "input": {}}
    many = [{"role": "user", "content": [text] * 1_000_000}]
    assert chat_messages({"messages": many}) == [{"role": "user", "content": "\n".join("x" * 1_000_000)}]
    turns = [{"role": "assistant", "content": [call]}, {"role": "user", "content": [text, result, text, text, result]}]
    roles = [(each["role"], each["content"]) for each in chat_messages({"messages": turns})]
    assert roles == [("assistant", ""), ("user", "x"), ("tool", "r"), ("user", "x\nx"), ("tool", "r")]
