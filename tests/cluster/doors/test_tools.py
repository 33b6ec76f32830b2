"""Tools and reasoning through the OpenAI SDK: the fake engine says a text, the client gets calls."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from tests.support.door_server import DoorThread
from tests.support.fake_client import FakeClient
from tests.support.small_tokenizers import write_model_folder

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{{ '\\n' }}{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.tool_call_id is defined %}({{ m.tool_call_id }}){% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments.items() | list }}]{% endfor %}"
    "{% if m.reasoning_content is defined %}<{{ m.reasoning_content }}>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if thinks %}<think>\n{% endif %}{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
AUTO = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
USER = {"role": "user", "content": "Sun?"}


class Chat:
    """The SDK and the engine behind it."""

    def __init__(self, doors: DoorThread, sdk: openai.OpenAI) -> None:
        self.doors, self._sdk = doors, sdk
        self.tokenizer = doors.service.validator.tokenizer

    def say(self, text: str) -> None:
        """What the model answers from now on."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        self.doors.client.model = lambda request: tokens

    def create(self, messages: Any = (USER,), **fields: Any) -> Any:
        return self._sdk.chat.completions.create(model="tiny", messages=list(messages), **fields)

    def stream(self, **fields: Any) -> tuple[dict[int, dict[str, Any]], list[Any]]:
        """Per choice what the deltas join to, and all chunks."""
        choices: dict[int, dict[str, Any]] = {}
        chunks = list(self.create(stream=True, **fields))
        for chunk in chunks:
            (choice,) = chunk.choices
            one = choices.setdefault(choice.index, {"content": "", "reasoning": "", "calls": {}, "finish": None})
            one["content"] += choice.delta.content or ""
            one["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            one["finish"] = choice.finish_reason or one["finish"]
            for call in choice.delta.tool_calls or ():
                if call.id:
                    one["calls"][call.index] = [call.id, call.type, call.function.name, ""]
                one["calls"][call.index][3] += call.function.arguments or ""
        return choices, chunks

    @property
    def prompt(self) -> str:
        return self.tokenizer.decode(list(self.doors.client.submitted[-1].prompt_token_ids))


@contextlib.contextmanager
def serving(folder: Path, **config: Any) -> Iterator[Chat]:
    with (
        DoorThread(FakeClient(), folder, **({"max_model_len": 512} | config)) as doors,
        openai.OpenAI(base_url=f"{doors.base_url}/v1", api_key="none", max_retries=0) as sdk,
    ):
        yield Chat(doors, sdk)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model_folder(tmp_path_factory.mktemp("tools"), chat_template=TEMPLATE)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "<think>", "</think>"]})
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    return folder


@pytest.fixture(scope="module")
def chat(folder: Path) -> Iterator[Chat]:
    with serving(folder, **AUTO, reasoning_parser="qwen3") as chat:
        yield chat


def test_a_call_of_a_tool(chat: Chat) -> None:
    chat.say(f"Let me see.\n{CALL}")
    answer = chat.create(tools=[TOOL])
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.id.startswith("chatcmpl-tool-")
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Köln"})
    assert json.loads(chat.prompt.splitlines()[0]) == [TOOL]


@pytest.mark.parametrize("tokens_per_chunk", [1, 4, 1000])
def test_a_streamed_call(chat: Chat, tokens_per_chunk: int) -> None:
    chat.doors.client.tokens_per_chunk = tokens_per_chunk
    chat.say(f"<think>\nHm.\n</think>\n\nWell.\n{CALL}\n{CALL.replace('Köln', 'Bonn')}")
    choices, chunks = chat.stream(tools=[TOOL], stream_options={"include_usage": False})
    (one,) = choices.values()
    assert (one["reasoning"], one["content"], one["finish"]) == ("Hm.", "Well.", "tool_calls")
    assert [call[1:] for call in one["calls"].values()] == [
        ["function", "weather", '{"city": "Köln"}'],
        ["function", "weather", '{"city": "Bonn"}'],
    ]
    assert len({call[0] for call in one["calls"].values()}) == 2
    if tokens_per_chunk == 1:
        pieces = [chunk for chunk in chunks if chunk.choices[0].delta.tool_calls]
        assert len(pieces) > 8  # arguments come as they are written
    chat.doors.client.tokens_per_chunk = 1


def test_the_sdk_accumulates_the_stream(chat: Chat) -> None:
    chat.say(CALL)
    with chat._sdk.chat.completions.stream(model="tiny", messages=[USER], tools=[TOOL]) as stream:  # type: ignore[list-item]
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls is not None
    assert final.choices[0].message.tool_calls[0].function.arguments == '{"city": "Köln"}'
    assert final.choices[0].finish_reason == "tool_calls"


def test_only_one_call_where_calls_are_not_parallel(chat: Chat) -> None:
    chat.say(f"{CALL}\n{CALL}")
    assert len(chat.create(tools=[TOOL]).choices[0].message.tool_calls) == 2
    assert len(chat.create(tools=[TOOL], parallel_tool_calls=False).choices[0].message.tool_calls) == 1
    choices, _ = chat.stream(tools=[TOOL], parallel_tool_calls=False)
    assert len(choices[0]["calls"]) == 1


def test_without_tools_or_with_none_the_text_stays(chat: Chat) -> None:
    chat.say(CALL)
    for fields in ({}, {"tools": [TOOL], "tool_choice": "none"}, {"tools": []}, {"tool_choice": "auto"}):
        (choice,) = chat.create(**fields).choices
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")


def test_a_call_that_is_cut_off_is_content(chat: Chat) -> None:
    chat.say(CALL)
    (choice,) = chat.create(tools=[TOOL], max_tokens=25).choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    assert CALL.startswith(choice.message.content)
    choices, _ = chat.stream(tools=[TOOL], max_tokens=25)
    assert choices[0]["finish"] == "length"


def test_every_completion_is_read_by_itself(chat: Chat) -> None:
    tokens = [chat.tokenizer.encode(text, add_special_tokens=False) for text in (CALL, "No.")]
    chat.doors.client.model = lambda request: tokens[(request.sampling.seed or 0) % 2]
    choices, _ = chat.stream(tools=[TOOL], n=2, seed=0)
    assert [choices[index]["finish"] for index in (0, 1)] == ["tool_calls", "stop"]
    assert choices[1]["content"] == "No."


def test_token_ids_and_logprobs_come_once(chat: Chat) -> None:
    chat.say(f"Well. {CALL}")
    extra = {"return_token_ids": True}
    whole = chat.create(tools=[TOOL], logprobs=True, extra_body=extra).choices[0]
    _, chunks = chat.stream(tools=[TOOL], logprobs=True, extra_body=extra)
    ids = [token for chunk in chunks for token in getattr(chunk.choices[0], "token_ids", None) or ()]
    told = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert ids == whole.token_ids
    assert len(told) == len(ids)


def test_reasoning_apart(chat: Chat) -> None:
    chat.say("<think>\nHm, hm.\n</think>\n\nYes.")
    message = chat.create().choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("Yes.", "Hm, hm.", "Hm, hm.")
    hidden = chat.create(extra_body={"include_reasoning": False}).choices[0].message
    assert hidden.content == "Yes."
    assert getattr(hidden, "reasoning_content", None) is None
    choices, _ = chat.stream(extra_body={"include_reasoning": False})
    assert (choices[0]["reasoning"], choices[0]["content"]) == ("", "Yes.")


def test_a_template_that_opens_the_thinking(chat: Chat) -> None:
    chat.say("Hm.\n</think>\n\nYes.")
    extra = {"chat_template_kwargs": {"thinks": True}}
    message = chat.create(extra_body=extra).choices[0].message
    assert chat.prompt.endswith("<think>\n")
    assert (message.content, message.reasoning_content) == ("Yes.", "Hm.")
    chat.say("Hm")
    message = chat.create(extra_body=extra).choices[0].message
    assert (message.content, message.reasoning_content) == (None, "Hm")


def test_markers_that_are_special_tokens_are_seen(folder: Path) -> None:
    config = {"enable_auto_tool_choice": True, "tool_call_parser": "mistral"}
    with serving(folder, **config) as chat:
        chat.say('[TOOL_CALLS]weather{"city": "Köln"}<pad>')
        (call,) = chat.create(tools=[TOOL]).choices[0].message.tool_calls
        assert (call.function.name, len(call.id)) == ("weather", 9)
        assert chat.create().choices[0].message.content == 'weather{"city": "Köln"}'  # left out as any special token


def test_a_conversation_with_calls(chat: Chat) -> None:
    chat.say("Sunny.")
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "reasoning": "Hm"}
    result = {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sun"}]}
    assert chat.create([USER, asked, result], tools=[TOOL]).choices[0].message.content == "Sunny."
    _, *lines = chat.prompt.splitlines()
    assert lines == [
        "<|user|>Sun?",
        "<|assistant|>[weather [('city', 'Köln')]]<Hm>",
        "<|tool|>(c1)sun",
        "<|assistant|>",
    ]


def test_tokenize_counts_tools(chat: Chat) -> None:
    def count(**fields: Any) -> int:
        answer = httpx.post(f"{chat.doors.base_url}/tokenize", json={"messages": [USER]} | fields)
        return int(answer.json()["count"])

    assert count(tools=[TOOL]) > count() + 50


def test_templates_that_join_arguments_get_texts(folder: Path) -> None:
    inner = "{% for c in m.tool_calls or [] %}{{ 'x' + c.function.arguments }}{% endfor %}"
    template = "{% for m in messages %}" + inner + "{% endfor %}"
    with serving(folder, chat_template=template) as chat:
        call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":   "ö"}'}}
        chat.say("ok")
        chat.create([USER, {"role": "assistant", "tool_calls": [call]}])
        assert chat.prompt == 'x{"a": "ö"}'


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": "x"}, "tools", "list"),
        ({"tools": [TOOL] * 1025}, "tools", "more than 1024"),
        ({"tools": [{"type": "function"}]}, "tools[0]", "function"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name", "1 to 128"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]},
            "tools[0].function.parameters",
            "schema",
        ),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice", "required"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice", "function"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "'g'"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [TOOL], "parallel_tool_calls": 1}, "parallel_tool_calls", "true or false"),
        ({"extra_body": {"include_reasoning": "no"}}, "include_reasoning", "true or false"),
    ],
)
def test_bad_fields(chat: Chat, fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat.create(**fields)
    assert caught.value.param == param
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"tool_calls": 5}, "tool_calls"),
        ({"tool_calls": [{"id": "a"}]}, "tool_calls[0]"),
        ({"tool_calls": [{"id": 5, "function": {"name": "f"}}]}, "tool_calls[0].id"),
        ({"tool_calls": [{"function": {"name": 5}}]}, "tool_calls[0].function.name"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "tool_calls[0].function.arguments"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}, "tool_calls[0].function.arguments"),
        ({"tool_call_id": 5}, "tool_call_id"),
    ],
)
def test_bad_history(chat: Chat, message: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat.create([USER, {"role": "assistant", "content": "x"} | message])
    assert caught.value.param == f"messages[1].{param}"


def test_auto_needs_the_flag_and_a_template_that_takes_tools(folder: Path, model_folder: Path) -> None:
    with serving(folder) as chat:
        with pytest.raises(openai.BadRequestError, match="requires --enable-auto-tool-choice and --tool-call-parser"):
            chat.create(tools=[TOOL])
        chat.say("ok")
        assert chat.create(tools=[TOOL], tool_choice="none").choices[0].message.content == "ok"
        assert "weather" in chat.prompt
    with serving(model_folder, **AUTO) as chat, pytest.raises(openai.BadRequestError, match="does not take tools"):
        chat.create(tools=[TOOL])


def test_the_flags_belong_together(folder: Path) -> None:
    with pytest.raises(ValueError, match="needs tool_call_parser"):
        DoorThread(FakeClient(), folder, enable_auto_tool_choice=True).__enter__()


@pytest.mark.parametrize("stream", [False, True])
def test_forced_choices(folder: Path, stream: bool) -> None:
    """The engine gets a constraint and the answer is read as what follows it; no flag is needed, thinking is off."""
    named = {"type": "function", "function": {"name": "weather"}}
    required = '[{"name": "weather", "parameters": {"city": "Köln"}}]'
    with serving(folder, reasoning_parser="deepseek_r1") as chat:
        for choice, text, finish in (("required", required, "tool_calls"), (named, '{"city": "Köln"}', "stop")):
            chat.say(text)
            if stream:
                (one,) = chat.stream(tools=[TOOL], tool_choice=choice)[0].values()
                calls = [tuple(call[2:]) for call in one["calls"].values()]
                assert (calls, one["content"], one["finish"]) == ([("weather", '{"city": "Köln"}')], "", finish)
            else:
                (answer,) = chat.create(tools=[TOOL], tool_choice=choice).choices
                (call,) = answer.message.tool_calls
                assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Köln"}')
                assert (answer.message.content, answer.finish_reason) == (None, finish)
            constraint = chat.doors.client.submitted[-1].sampling.structured_outputs
            assert constraint is not None
            assert '"city"' in constraint.grammar_text()[1]
