"""Reads the object that most formats write a call as: {"name": "f", "arguments": {...}}, keys in any order."""

import json
from collections.abc import Callable

from manta.cluster.doors.tools.json_value import WHITESPACE, JsonError, JsonValue

_ARGUMENT_KEYS = ("arguments", "parameters")


class JsonCallReader:
    """Tells of the name as soon as the arguments begin, and of the arguments while they are written.

    Arguments may also be a string that holds a JSON object, or null; these are told when they are complete.
    """

    def __init__(
        self, on_name: Callable[[str], None], on_arguments: Callable[[str], None], needs_arguments: bool = False
    ) -> None:
        self._on_name, self._on_arguments = on_name, on_arguments
        self._needs_arguments = needs_arguments
        self._expects = "{"
        self._key: str | None = None  # whose value is being read
        self._value: JsonValue | None = None  # the key or value being read
        self._buffer: list[str] = []
        self._name = ""
        self._untold: list[str] = []  # arguments before the name is known
        self._is_told = False
        self._arguments_done = False

    @property
    def has_call(self) -> bool:
        """Name and arguments are complete, even if the object is not."""
        return self._is_told and self._arguments_done

    def feed(self, char: str) -> bool:
        """True when the object is complete. Raises JsonError if it cannot become a call; the character is not taken."""
        if self._value is not None:
            passed = self._value.feed(char)
            if passed is not None:
                self._take(passed)
            if self._value.is_done:
                self._end_value()
            if passed is not None:
                return False
        return char not in WHITESPACE and self._between(char)

    def feed_plain(self, text: str, position: int) -> int:
        """Feeds what of `text`, from `position` on, is within a string and has no meaning there; returns its end."""
        end = self._value.plain_end(text, position) if self._value is not None else position
        if end > position:
            self._take(text[position:end])
        return end

    def _between(self, char: str) -> bool:
        """A character outside of keys and values."""
        if self._expects == "value":
            self._begin_value(char)
        elif char not in self._expects:
            raise JsonError(f"expected one of {self._expects}")
        elif char == '"':
            self._key = None
            self._begin_value(char)
        elif char == "{":
            self._expects = '"}'
        elif char == ":":
            self._expects = "value"
        elif char == ",":
            self._expects = '"'
        else:
            self._end_object()
            return True
        return False

    def _begin_value(self, char: str) -> None:
        self._value, self._buffer = JsonValue(), []
        passed = self._value.feed(char)
        assert passed is not None  # nothing ends with its first character
        self._take(passed)

    @property
    def _is_argument(self) -> bool:
        return self._key in _ARGUMENT_KEYS and not self._arguments_done

    def _take(self, text: str) -> None:
        self._buffer.append(text)
        if self._is_argument and self._buffer[0] == "{":
            self._tell(text)

    def _end_value(self) -> None:
        self._value = None
        text = "".join(self._buffer)
        if self._key is None:
            self._key, self._expects = str(json.loads(text, strict=False)), ":"
            return
        self._expects = ",}"
        if self._key == "name" and not self._name:
            self._name = json.loads(text, strict=False) if text.startswith('"') else ""
            if not self._name or not self._name.isprintable():
                raise JsonError("the name is no name")
            if self._untold:
                self._tell("")
        elif self._is_argument:
            if not text.startswith("{"):
                self._tell(_as_object(text))
            self._arguments_done = True

    def _end_object(self) -> None:
        if not self._name or (self._needs_arguments and not self._arguments_done):
            raise JsonError("name or arguments are missing")
        if not self._arguments_done:
            self._tell("{}")
            self._arguments_done = True

    def _tell(self, text: str) -> None:
        self._untold.append(text)
        if not self._name:
            return
        if not self._is_told:
            self._is_told = True
            self._on_name(self._name)
        self._on_arguments("".join(self._untold))
        self._untold.clear()


def _as_object(text: str) -> str:
    """The JSON object that is meant by arguments which are none. Raises JsonError."""
    if text == "null":
        return "{}"
    if text.startswith('"'):
        value = str(json.loads(text, strict=False))
        try:
            value.encode()  # half a surrogate pair cannot be sent
            if isinstance(json.loads(value), dict):
                return value
        except (ValueError, RecursionError):
            pass
    raise JsonError("the arguments are no object")
