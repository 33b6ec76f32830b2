"""Reads JSON character by character, so that it can be passed on while it is still being written."""

import json
import re
from collections.abc import Callable

WHITESPACE = frozenset(" \t\n\r")
_LITERAL_STARTS = frozenset("-0123456789tfn")
_LITERAL = frozenset("+-.0123456789eEtrufalsn")
_LITERALS = re.compile(r"true|false|null|-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_ESCAPES = frozenset('"\\/bfnrt')
_HEX = frozenset("0123456789abcdefABCDEF")
_CLOSING = {"{": "}", "[": "]"}


class JsonError(ValueError):
    """The text is not what was expected; the character that shows it was not taken."""


class JsonValue:
    """The automaton of one JSON value (RFC 8259).

    One thing is forgiven: control characters within strings, which models write as they are, pass on escaped.
    """

    def __init__(self) -> None:
        self.is_done = False
        self._open: list[str] = []  # brackets
        self._state: Callable[[str], str | None] = self._on_value
        self._literal = ""
        self._is_key = False
        self._num_hex = 0

    def feed(self, char: str) -> str | None:
        """The character as it passes on; None if the value, a number or a word, has ended before it.

        Raises JsonError if no JSON can begin like this.
        """
        return self._state(char)

    def plain_end(self, text: str, position: int) -> int:
        """Where the characters of a string end that, from `position` on, pass on as they are; no need to feed them."""
        found = _PLAIN.match(text, position) if self._state == self._on_string else None
        return found.end() if found else position

    def _on_value(self, char: str) -> str | None:
        if char in _CLOSING:
            self._open.append(char)
            self._state = self._on_first_key if char == "{" else self._on_first_item
        elif char == '"':
            self._state, self._is_key = self._on_string, False
        elif char in _LITERAL_STARTS:
            self._state, self._literal = self._on_literal, char
        elif char not in WHITESPACE:
            raise JsonError("a value is missing")
        return char

    def _on_first_item(self, char: str) -> str | None:
        return self._on_next(char) if char == "]" else self._on_value(char)

    def _on_first_key(self, char: str) -> str | None:
        return self._on_next(char) if char == "}" else self._on_key(char)

    def _on_key(self, char: str) -> str | None:
        if char == '"':
            self._state, self._is_key = self._on_string, True
        elif char not in WHITESPACE:
            raise JsonError("a key is missing")
        return char

    def _on_colon(self, char: str) -> str | None:
        if char == ":":
            self._state = self._on_value
        elif char not in WHITESPACE:
            raise JsonError("a colon is missing")
        return char

    def _on_string(self, char: str) -> str | None:
        if char == '"':
            if self._is_key:
                self._state = self._on_colon
            else:
                self._end_value()
        elif char == "\\":
            self._state = self._on_escape
        elif char < " ":
            return json.dumps(char)[1:-1]
        return char

    def _on_escape(self, char: str) -> str | None:
        if char == "u":
            self._state, self._num_hex = self._on_hex, 4
        elif char in _ESCAPES:
            self._state = self._on_string
        else:
            raise JsonError("an unknown escape")
        return char

    def _on_hex(self, char: str) -> str | None:
        if char not in _HEX:
            raise JsonError("not a hexadecimal digit")
        self._num_hex -= 1
        if self._num_hex == 0:
            self._state = self._on_string
        return char

    def _on_literal(self, char: str) -> str | None:
        if char in _LITERAL:
            self._literal += char
            return char
        if not _LITERALS.fullmatch(self._literal):
            raise JsonError("neither a number nor true, false or null")
        self._end_value()
        return None if self.is_done else self._on_next(char)

    def _on_next(self, char: str) -> str | None:
        """After a value within brackets."""
        if char == ",":
            self._state = self._on_key if self._open[-1] == "{" else self._on_value
        elif char == _CLOSING[self._open[-1]]:
            self._open.pop()
            self._end_value()
        elif char not in WHITESPACE:
            raise JsonError("a comma or a bracket is missing")
        return char

    def _end_value(self) -> None:
        self.is_done = not self._open
        self._state = self._on_next
