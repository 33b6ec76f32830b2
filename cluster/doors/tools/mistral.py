"""Mistral: [TOOL_CALLS] and an array of calls, or from the tokenizers of 2025 on [TOOL_CALLS]f{...} for each call,
also written [TOOL_CALLS]f[ARGS]{...} and [TOOL_CALLS]f[CALL_ID]abc[ARGS]{...}."""

import secrets
import string

from manta.cluster.doors.tools.parser import JsonArrayParser

_ALPHABET = string.ascii_letters + string.digits
_ID_CHARACTERS = 9  # Mistral's chat templates refuse other lengths
_NAME = frozenset(_ALPHABET + "_-.:/")
_TAGS = ("[ARGS]", "[CALL_ID]")


class MistralParser(JsonArrayParser):
    OPENINGS = ("[TOOL_CALLS]",)
    MARKERS = (*OPENINGS, *_TAGS)

    def new_id(self) -> str:
        return "".join(secrets.choice(_ALPHABET) for _ in range(_ID_CHARACTERS))

    def _open(self, opening: str) -> None:
        self._state = self._before
        self._fields = {"name": "", "id": ""}
        self._field = "name"
        self._tag = ""

    def _before(self, char: str) -> None:
        """Behind the opening: which form is it?"""
        if char in _NAME:
            self._state = self._head
            self._head(char)
        elif char == "[":
            self._raw.append(char)
            self._state = self._item
        elif char == "{":
            self._begin_object(char)
        elif char.isspace():
            self._raw.append(char)
        else:
            self._give_up(char)

    def _head(self, char: str) -> None:
        """The name, and what may be between it and the arguments."""
        if self._tag or char == "[":
            self._read_tag(char)
        elif char == "{":
            self._begin_arguments(self._fields["name"], self._fields["id"])
            self._lone_arguments(char)
        elif char in _NAME:
            self._raw.append(char)
            self._fields[self._field] += char
        elif char.isspace():
            self._raw.append(char)
        else:
            self._give_up(char)

    def _read_tag(self, char: str) -> None:
        self._tag += char
        if not any(tag.startswith(self._tag) for tag in _TAGS):
            self._give_up(char)
            return
        self._raw.append(char)
        if self._tag in _TAGS:
            self._field = "id" if self._tag == "[CALL_ID]" else self._field
            self._tag = ""
