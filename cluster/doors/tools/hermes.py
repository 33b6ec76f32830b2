"""Hermes 2 Pro, Qwen2.5, Qwen3: <tool_call>{"name": "f", "arguments": {...}}</tool_call>."""

from manta.cluster.doors.tools.parser import JsonCallParser

_CLOSING = "</tool_call>"


class HermesParser(JsonCallParser):
    """A missing closing tag is forgiven."""

    OPENINGS = ("<tool_call>",)
    MARKERS = ("<tool_call>", _CLOSING)

    def _open(self, opening: str) -> None:
        self._state = self._before
        self._tag = ""  # what of the closing tag was read

    def _before(self, char: str) -> None:
        if char == "{":
            self._begin_object(char)
        elif char.isspace():
            self._raw.append(char)
        else:
            self._give_up(char)

    def _after(self, char: str) -> None:
        self._raw.append(char)
        if char.isspace() and not self._tag:
            return
        self._tag += char
        if self._tag == _CLOSING:
            self._raw, self._state = [], self._text
        elif not _CLOSING.startswith(self._tag):
            raw, self._raw = "".join(self._raw), []
            self._to_text(raw)
