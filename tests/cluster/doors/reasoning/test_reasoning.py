"""Thinking apart from content: tags in the answer, in the prompt, or nowhere; calls behind the thinking."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.cluster.doors.answer import AnswerReader, message_body, plan_answer
from manta.cluster.doors.reasoning.parser import ReasoningParser
from manta.cluster.doors.reasoning.registry import REASONING_FORMATS
from manta.cluster.doors.tools.events import Call, Content, Event, Reasoning, merged
from manta.cluster.doors.tools.request import ToolRequest
from manta.configs.schema import ServeConfig
from tests.cluster.doors.tools.reading import CUTS, TEXTS, all_pairs, pieces_of, read


def test_the_flag_lists_what_there_is() -> None:
    annotation = ServeConfig.model_fields["reasoning_parser"].annotation
    assert all(repr(name) in str(annotation) for name in REASONING_FORMATS)
    assert str(annotation).count("'") == 2 * len(REASONING_FORMATS)


def parts(name: str, prompt: str, text: str, continued: str | None = None) -> tuple[str, str]:
    parser = REASONING_FORMATS[name].new_parser(prompt, continued)
    if parser is None:
        return "", text
    events = read(parser, [text])
    return (
        "".join(event.text for event in events if isinstance(event, Reasoning)),
        "".join(event.text for event in events if isinstance(event, Content)),
    )


@pytest.mark.parametrize(
    ("name", "prompt", "text", "reasoning", "content"),
    [
        ("qwen3", "<|assistant|>", "<think>\nHm.\n\n</think>\n\nYes.", "Hm.", "Yes."),
        ("qwen3", "<|assistant|>", "Yes.", "", "Yes."),
        ("qwen3", "<|assistant|>", " Yes <think>no</think>", "", " Yes <think>no</think>"),
        ("qwen3", "<|assistant|><think>\n", "Hm.\n</think>\nYes.", "Hm.", "Yes."),  # the template has opened
        ("qwen3", "<|assistant|><think>\n\n</think>\n\n", "Yes.</think>", "", "Yes.</think>"),  # and closed
        ("qwen3", "say <think>\n<|assistant|>", "Yes.", "", "Yes."),  # a user's tag says nothing
        ("qwen3", "", "<think>Hm", "Hm", ""),
        ("qwen3", "", "<thi", "", "<thi"),
        ("deepseek_r1", "<|assistant|>", "Hm.\n</think>\n\nYes.", "Hm.", "Yes."),
        ("deepseek_r1", "<|assistant|>", "<think>Hm.</think>Yes.", "Hm.", "Yes."),
        ("deepseek_r1", "<|assistant|>", "Hm, and no end </thin", "Hm, and no end </thin", ""),
        ("deepseek_r1", "<|assistant|>", "a</thin</think>b</think>c", "a</thin", "b</think>c"),
        ("mistral", "", "[THINK]Hm.[/THINK]Yes.", "Hm.", "Yes."),
        ("seed_oss", "", "<seed:think>Hm.</seed:think>Yes.", "Hm.", "Yes."),
        ("glm45", "", "\n<think>Hm.</think>\nYes.", "Hm.", "Yes."),
    ],
)
def test_parts(name: str, prompt: str, text: str, reasoning: str, content: str) -> None:
    assert parts(name, prompt, text) == (reasoning, content)
    format = REASONING_FORMATS[name]
    if format.new_parser(prompt) is not None:
        all_pairs(lambda: format.new_parser(prompt), text)  # type: ignore[arg-type, return-value]


def test_answers_that_the_prompt_has_begun() -> None:
    assert parts("qwen3", "...", "so.</think>Yes.", "<think>Hm, ") == ("so.", "Yes.")
    assert parts("qwen3", "...", " indeed.", "<think>Hm.</think>Yes") == ("", " indeed.")


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(["<think>", "</think>", "<", "</", " ", "\n", "x", "think>"]) | TEXTS, max_size=10),
    is_open=st.booleans(),
    cuts=CUTS,
)
def test_cuts_do_not_matter_and_no_text_is_lost(pieces: list[str], is_open: bool, cuts: list[int]) -> None:
    text = "".join(pieces)
    whole = read(ReasoningParser("<think>", "</think>", is_open), [text])
    assert read(ReasoningParser("<think>", "</think>", is_open), pieces_of(text, cuts)) == whole
    told = "".join(event.text for event in whole if isinstance(event, Reasoning | Content))
    visible = "".join(text.split())
    without = visible.replace("<think>", "", 1) if visible.startswith("<think>") else visible
    assert "".join(told.split()) in (visible, without, without.replace("</think>", "", 1))


def reader(**config: object) -> AnswerReader:
    fields = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "reasoning_parser": "qwen3"} | config
    served = ServeConfig.model_validate({"model": "m"} | fields)
    return plan_answer(served, ToolRequest([], "auto"), True, "", None).new_reader()


def run(reader: AnswerReader, pieces: list[str]) -> list[Event]:
    events = [event for piece in pieces for event in reader.push(piece, False)] + reader.push("", True)
    for event in events:
        if isinstance(event, Call):
            event.id = ""
    return merged(events)


@settings(max_examples=60, deadline=None)
@given(cuts=CUTS)
def test_calls_behind_the_thinking(cuts: list[int]) -> None:
    inner = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    text = f"<think>\nShall I {inner}?\n</think>\n\nLook:\n{inner.replace('g', 'f')}"
    first = reader()
    events = run(first, pieces_of(text, cuts))
    body = message_body(events)
    assert body["reasoning_content"] == body["reasoning"] == f"Shall I {inner}?"
    assert body["content"] == "Look:"
    assert [call["function"]["name"] for call in body["tool_calls"]] == ["f"]
    assert json.loads(body["tool_calls"][0]["function"]["arguments"]) == {}
    assert first.finish_reason("stop") == "tool_calls"
    assert first.finish_reason("length") == "length"
    assert events == run(reader(), [text])


def test_special_tokens_that_must_be_seen() -> None:
    config = ServeConfig(
        model="m", enable_auto_tool_choice=True, tool_call_parser="mistral", reasoning_parser="mistral"
    )
    seen = plan_answer(config, ToolRequest([], "auto"), True, "", None).visible_tokens
    assert {"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"} == seen
    assert plan_answer(config, ToolRequest(), True, "", None).visible_tokens == {"[THINK]", "[/THINK]"}
