"""Every format of tool calls: calls written by a second hand are read back, and all else is content."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.cluster.doors.tools.events import Content
from manta.cluster.doors.tools.forced import NamedParser, RequiredParser
from manta.cluster.doors.tools.parser import ToolParser
from manta.cluster.doors.tools.registry import TOOL_PARSERS
from manta.configs.schema import ServeConfig
from tests.cluster.doors.tools.reading import CALLS, CUTS, TEXTS, VALUES, all_pairs, message_of, pieces_of, read

Calls = list[tuple[str, dict[str, Any]]]


def objects(calls: Calls, key: str = "arguments") -> list[str]:
    return [json.dumps({"name": name, key: arguments}) for name, arguments in calls]


def python_calls(calls: Calls) -> str:
    texts = [f"{name}({', '.join(f'{key}={value!r}' for key, value in kwargs.items())})" for name, kwargs in calls]
    return f"[{', '.join(texts)}]"


def coder_calls(calls: Calls) -> str:
    text = ""
    for name, kwargs in calls:
        parameters = "".join(f"<parameter={k}>\n{json.dumps(v)}\n</parameter>\n" for k, v in kwargs.items())
        text += f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>\n"
    return text


def mistral_calls(calls: Calls, form: str) -> str:
    if form == "array":
        return f"[TOOL_CALLS] [{', '.join(objects(calls))}]"
    return "".join(f"[TOOL_CALLS]{name}{form}{json.dumps(kwargs)}" for name, kwargs in calls)


WRITERS: dict[str, tuple[Callable[[], ToolParser], Callable[[Calls], str]]] = {
    "hermes": (
        TOOL_PARSERS["hermes"],
        lambda calls: "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in objects(calls)),
    ),
    "llama3_json": (TOOL_PARSERS["llama3_json"], lambda calls: "; ".join(objects(calls, "parameters"))),
    "llama3_tag": (
        TOOL_PARSERS["llama3_json"],
        lambda calls: "<|python_tag|>" + ";".join(objects(calls, "parameters")),
    ),
    "mistral_array": (TOOL_PARSERS["mistral"], lambda calls: mistral_calls(calls, "array")),
    "mistral_direct": (TOOL_PARSERS["mistral"], lambda calls: mistral_calls(calls, "")),
    "mistral_args": (TOOL_PARSERS["mistral"], lambda calls: mistral_calls(calls, "[ARGS]")),
    "pythonic": (TOOL_PARSERS["pythonic"], python_calls),
    "qwen3_coder": (TOOL_PARSERS["qwen3_coder"], coder_calls),
    "required": (RequiredParser, lambda calls: f"[{', '.join(objects(calls, 'parameters'))}]"),
}


def test_the_flag_lists_what_there_is() -> None:
    annotation = ServeConfig.model_fields["tool_call_parser"].annotation
    assert all(repr(name) in str(annotation) for name in TOOL_PARSERS)
    assert str(annotation).count("'") == 2 * len(TOOL_PARSERS)


@pytest.mark.parametrize("form", WRITERS)
@settings(max_examples=40, deadline=None)
@given(calls=CALLS, cuts=CUTS)
def test_calls_are_read_back_however_the_text_is_cut(form: str, calls: Calls, cuts: list[int]) -> None:
    new, write = WRITERS[form]
    text = write(calls)
    content, found = message_of(new(), text)
    assert content is None
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    assert read(new(), pieces_of(text, cuts)) == read(new(), [text])


@pytest.mark.parametrize("form", ["hermes", "mistral_array", "mistral_direct", "qwen3_coder", "llama3_tag"])
@settings(max_examples=30, deadline=None)
@given(before=TEXTS, calls=CALLS)
def test_text_before_calls_is_content(form: str, before: str, calls: Calls) -> None:
    new, write = WRITERS[form]
    content, found = message_of(new(), before + write(calls))
    assert (content or "") == before.rstrip()
    assert len(found) == len(calls)


PIECES = {
    "hermes": ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": ', '{"a": 1}', "}"],
    "llama3_json": ["<|python_tag|>", '{"name": "f", ', '"parameters": ', '{"a": "x"}', "}", ";"],
    "mistral": ["[TOOL_CALLS]", "f", '{"a": 1}', "[", "]", ",", '{"name": "f", "arguments": {}}', "[ARGS]"],
    "pythonic": ["[", "f(", "a=1", ")", ",", "]", "'", "g()", "{"],
    "qwen3_coder": ["<tool_call>", "<function=f>", "<parameter=a>", "1", "</parameter>", "</function>", "</tool_call>"],
}


@pytest.mark.parametrize("name", TOOL_PARSERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), cuts=CUTS)
def test_no_text_raises_or_is_lost(name: str, data: st.DataObject, cuts: list[int]) -> None:
    """Markers in any order, cut short, with noise between them."""
    noise = st.sampled_from([" ", "\n", "x", "<", '"', "\\", "[TOOL", "</tool"])
    text = "".join(data.draw(st.lists(st.sampled_from(PIECES[name]) | noise, max_size=14)))
    new = TOOL_PARSERS[name]
    assert read(new(), pieces_of(text, cuts)) == read(new(), [text])
    content, calls = message_of(new(), text)
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)
    if not calls:
        assert content == text


WEATHER = '{"name": "weather", "arguments": {"city": "Köln"}}'


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", "Just text.\n", "Just text.\n", []),
        ("hermes", "", "", []),
        ("hermes", f"Hm.\n<tool_call>{WEATHER}</tool_call>\nDone.", "Hm.\nDone.", [("weather", '{"city": "Köln"}')]),
        ("hermes", f"<tool_call>{WEATHER}", None, [("weather", '{"city": "Köln"}')]),  # no closing tag
        ("hermes", '<tool_call>{"name":"f","arguments":{"a":1}</tool_call>', None, [("f", '{"a":1}')]),  # no bracket
        ("hermes", '<tool_call>{"arguments": {"a":1}, "name": "f"}</tool_call>', None, [("f", '{"a":1}')]),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', None, [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', None, [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', None, [("f", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>', None, [("f", '{"a": "x\\ny"}')]),
        ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>', ..., []),
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>', ..., []),
        ("hermes", f'<tool_call>{{"name": {"9" * 5000}, "arguments": {{}}}}</tool_call>', ..., []),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', ..., []),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": tru}}</tool_call>', ..., []),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "cut of', ..., []),
        ("hermes", "Write <tool_call> to call.", ..., []),
        ("hermes", f"<tool_call><tool_call>{WEATHER}</tool_call>", "<tool_call>", [("weather", '{"city": "Köln"}')]),
        ("llama3_json", '{"name": "Bob", "age": 5}', ..., []),
        ("llama3_json", 'The answer: {"name": "f", "parameters": {}}', ..., []),
        ("llama3_json", '{"name": "f", "parameters": {}}\n', None, [("f", "{}")]),
        ("llama3_json", '<|python_tag|>search.call(query="x")', ..., []),
        ("mistral", "[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{}", None, [("f", "{}")]),
        ("mistral", "[TOOL_CALLS]f{", ..., []),
        ("mistral", "[TOOL_CALLS] []", ..., []),
        ("mistral", "[1, 2]", ..., []),
        ("pythonic", '[a.b(x=[1, {"y": None}], z=true)]', None, [("a.b", '{"x": [1, {"y": null}], "z": true}')]),
        ("pythonic", '[f(x="a]b)c\\"(", y=\'(\')]', None, [("f", '{"x": "a]b)c\\"(", "y": "("}')]),
        ("pythonic", '[f(x="two\nlines")]', None, [("f", '{"x": "two\\nlines"}')]),
        ("pythonic", "[1, 2, 3]", ..., []),
        ("pythonic", "[see](http://x)", ..., []),
        ("pythonic", "[f(1)]", ..., []),
        ("pythonic", "[f(a=g())]", ..., []),
        ("pythonic", "[f(**{})]", ..., []),
        ("pythonic", "[f(a=1e999)]", ..., []),
        ("pythonic", "[f(a=" + "(" * 3000 + ")" * 3000 + ")]", ..., []),
        ("pythonic", "[f(a=__import__('os').getpid())]", ..., []),
        ("pythonic", "[f(a=1), g(]", ", g(]", [("f", '{"a": 1}')]),
        ("qwen3_coder", "<function=f></function>", None, [("f", "{}")]),
        ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=a>\n1\n", ..., []),
    ],
)
def test_odd_answers(name: str, text: str, content: Any, calls: list[tuple[str, str]]) -> None:
    """`...`: all of the text is content."""
    assert message_of(TOOL_PARSERS[name](), text) == (text if content is ... else content, calls)
    if len(text) < 1000:
        all_pairs(TOOL_PARSERS[name], text)


def test_arguments_come_while_they_are_written() -> None:
    parser = TOOL_PARSERS["hermes"]()
    (content,) = parser.push("Well.\n<tool_call>\n")
    assert content == Content("Well.")
    text = '{"name": "f", "arguments": {"text": "one two three'
    started = [type(event).__name__ for event in parser.push(text)]
    assert started == ["Call", "Arguments"]
    (event,) = parser.push(" four")
    assert event.text == " four"  # type: ignore[union-attr]


def test_what_was_told_of_a_broken_call_stays_in_a_stream() -> None:
    events = read(TOOL_PARSERS["hermes"](), ['<tool_call>{"name": "f", "arguments": {"a": x}} more'])
    kinds = [type(event).__name__ for event in events]
    assert kinds == ["Call", "Arguments", "Broken", "Content"]
    assert events[1].text == '{"a": '  # type: ignore[union-attr]
    assert events[3].text == "x}} more"  # type: ignore[union-attr]


def test_types_of_the_schema_decide_how_coder_values_are_read() -> None:
    properties = {"zip": {"type": "string"}, "n": {"type": "integer"}, "maybe": {"type": ["string", "null"]}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}]
    text = (
        "<tool_call><function=f><parameter=zip>0123</parameter><parameter=n>5</parameter>"
        "<parameter=maybe>null</parameter><parameter=other>two\nlines</parameter></function></tool_call>"
    )
    _, ((_, arguments),) = message_of(TOOL_PARSERS["qwen3_coder"](tools), text)
    assert json.loads(arguments) == {"zip": "0123", "n": 5, "maybe": None, "other": "two\nlines"}


def test_ids() -> None:
    (call, _) = TOOL_PARSERS["mistral"]().push("[TOOL_CALLS]f{}")
    assert len(call.id) == 9  # type: ignore[union-attr]
    assert call.id.isalnum()  # type: ignore[union-attr]
    (call, _) = TOOL_PARSERS["mistral"]().push("[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{}")
    assert call.id == "abc123def"  # type: ignore[union-attr]
    (call, _) = TOOL_PARSERS["hermes"]().push('<tool_call>{"name": "f", "arguments": {}}')
    assert call.id.startswith("chatcmpl-tool-")  # type: ignore[union-attr]


@settings(max_examples=30, deadline=None)
@given(arguments=st.dictionaries(TEXTS, VALUES, max_size=3), cuts=CUTS)
def test_a_named_function_gets_the_whole_answer(arguments: dict[str, Any], cuts: list[int]) -> None:
    text = json.dumps(arguments)
    content, ((name, found),) = message_of(NamedParser("f"), text)
    assert (content, name, json.loads(found)) == (None, "f", arguments)
    assert read(NamedParser("f"), pieces_of(text, cuts)) == read(NamedParser("f"), [text])
    assert message_of(NamedParser("f"), "No.") == ("No.", [])
