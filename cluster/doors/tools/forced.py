"""Answers that a constraint forces to be calls: tool_choice "required" and a named function."""

from manta.cluster.doors.tools.parser import JsonArrayParser, JsonCallParser


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


class NamedParser(JsonCallParser):
    """The answer is the arguments of the function `name`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._state = self._start

    def _start(self, char: str) -> None:
        if char == "{":
            self._begin_arguments(self._name)
            self._lone_arguments(char)
        elif char.isspace():
            self._raw.append(char)
        else:
            self._give_up(char)
