"""Llama 3.2 and 4, ToolACE: the answer is a list of Python calls, [f(a=1, b="x"), g()]. It is parsed, never run."""

import ast
import json
import warnings
from collections.abc import Sequence
from typing import Any

from manta.cluster.doors.tools.parser import ToolParser

_OPENING, _CLOSING = "([{", ")]}"
_JSON_NAMES = {"true": True, "false": False, "null": None}  # models mix the languages


class PythonicParser(ToolParser):
    """The list is what the answer begins with. A call comes out when its parenthesis closes, with all its arguments."""

    def __init__(self, tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(tools)
        self._state = self._start
        self._source: list[str] = []  # of one call
        self._depth = 0  # of brackets within it
        self._quote = ""
        self._escaped = False

    def _start(self, char: str) -> None:
        self._raw.append(char)
        if char == "[":
            self._state = self._before
        elif not char.isspace():
            self._raw.pop()
            self._give_up(char)

    def _before(self, char: str) -> None:
        """A call is expected."""
        if char.isidentifier():
            self._source, self._depth = [], 0
            self._state = self._name
            self._name(char)
        elif char.isspace():
            self._raw.append(char)
        else:
            self._give_up(char)

    def _name(self, char: str) -> None:
        if char == "(":
            self._state = self._call
            self._call(char)
        elif char.isalnum() or char in "_. ":
            self._raw.append(char)
            self._source.append(char)
        else:
            self._give_up(char)

    def _call(self, char: str) -> None:
        self._raw.append(char)
        self._source.append(char)
        if self._quote:
            self._within_quotes(char)
        elif char in "\"'":
            self._quote = char
        elif char in _OPENING:
            self._depth += 1
        elif char in _CLOSING:
            self._depth -= 1
            if self._depth == 0:
                self._end_call()

    def _within_quotes(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == self._quote:
            self._quote = ""

    def _end_call(self) -> None:
        call = _read_call("".join(self._source))
        if call is None:
            self._give_up()
            return
        self._announce(call[0])
        self._argue(call[1])
        self._complete()
        self._state = self._after

    def _after(self, char: str) -> None:
        if char == ",":
            self._raw.append(char)
            self._state = self._before
        elif char == "]":
            self._raw, self._state = [], self._text
        elif char.isspace():
            self._raw.append(char)
        else:
            self._give_up(char)


def _read_call(source: str) -> tuple[str, str] | None:
    """Name and arguments as JSON of a call with keyword arguments that are literals; None if it is anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of unknown escapes in what a model wrote
            call = ast.parse(_joined_lines(source), mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        arguments = {}
        for keyword in call.keywords:
            if keyword.arg is None:  # **more
                return None
            arguments[keyword.arg] = ast.literal_eval(_JsonNames().visit(keyword.value))
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        text.encode()  # half a surrogate pair cannot be sent
        return ast.unparse(call.func), text
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _joined_lines(source: str) -> str:
    """Line breaks as models write them within strings, which Python does not take, become escapes."""
    pieces, quote, is_escaped = [], "", False
    for char in source:
        if not quote:
            quote = char if char in "\"'" else ""
        elif is_escaped or char == "\\":
            is_escaped = not is_escaped
        elif char == quote:
            quote = ""
        elif char in "\r\n":
            char = "\\n" if char == "\n" else "\\r"
        pieces.append(char)
    return "".join(pieces)


class _JsonNames(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_JSON_NAMES[node.id]) if node.id in _JSON_NAMES else node
