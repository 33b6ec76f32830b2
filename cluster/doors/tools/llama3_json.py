"""Llama 3.1 and 3.2: the answer is {"name": "f", "parameters": {...}}, several are separated by semicolons."""

from collections.abc import Sequence
from typing import Any

from manta.cluster.doors.tools.parser import JsonCallParser


class Llama3JsonParser(JsonCallParser):
    """A call is what the answer begins with, or what follows the tag; any other JSON is content."""

    OPENINGS = ("<|python_tag|>",)
    MARKERS = OPENINGS
    NEEDS_ARGUMENTS = True  # only these tell a call from other objects with a name

    def __init__(self, tools: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(tools)
        self._state = self._before

    def _open(self, opening: str) -> None:
        self._state = self._before

    def _before(self, char: str) -> None:
        if char == "{":
            self._begin_object(char)
        elif char.isspace():
            self._raw.append(char)
        elif self._num_calls == 0 and "".join(self._raw).isspace():  # before the first character that is visible
            raw, self._raw = "".join(self._raw), []
            self._to_text(raw + char)  # where the whitespace may belong to an opening
        else:
            self._give_up(char)

    def _after(self, char: str) -> None:
        self._raw.append(char)
        if char == ";":
            self._state = self._before
        elif not char.isspace():
            raw, self._raw = "".join(self._raw), []
            self._to_text(raw)
