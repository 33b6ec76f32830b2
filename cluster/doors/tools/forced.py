"""Answers that a constraint forces to be calls: tool_choice "required" and a named function."""

from manta.cluster.doors.tools.json_value import JsonError, JsonValue
from manta.cluster.doors.tools.parser import JsonArrayParser, ToolParser


class RequiredParser(JsonArrayParser):
    """The answer is [{"name": "f", "parameters": {...}}, ...]."""

    def __init__(self) -> None:
        super().__init__()
        self._state = self._start

    def _start(self, char: str) -> None:
        if char == "[" or char.isspace():
            self._raw.append(char)
            self._state = self._item if char == "[" else self._start
        else:
            self._give_up(char)


class NamedParser(ToolParser):
    """The answer is the arguments of the function `name`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._value = JsonValue()
        self._state = self._start

    def _start(self, char: str) -> None:
        if char == "{":
            self._announce(self._name)
            self._state = self._object
            self._object(char)
        elif char.isspace():
            self._raw.append(char)
        else:
            self._give_up(char)

    def _object(self, char: str) -> None:
        try:
            passed = self._value.feed(char)
        except JsonError:
            self._give_up(char)
            return
        self._raw.append(char)
        self._argue(passed or "")
        if self._value.is_done:
            self._complete()
            self._state = self._text
