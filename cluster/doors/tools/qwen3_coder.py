"""Qwen3-Coder: <tool_call><function=f><parameter=a>value</parameter></function></tool_call>, values without quotes."""

import json
from typing import Any

from manta.cluster.doors.tools.parser import ToolParser

_FUNCTION, _PARAMETER = "<function=", "<parameter="
_END_PARAMETER, _END_FUNCTION, _END_CALL = "</parameter>", "</function>", "</tool_call>"
_MAX_NAME = 256  # characters of a name; a longer one is none


class Qwen3CoderParser(ToolParser):
    """A value is read as JSON unless the tool's schema says that it is a string; it comes out when it is complete."""

    OPENINGS = ("<tool_call>", _FUNCTION)
    MARKERS = ("<tool_call>", _END_CALL)

    def _open(self, opening: str) -> None:
        self._read = ""  # since the last tag
        self._value: list[str] = []
        self._keys: list[str] = []
        self._state = self._function_name if opening == _FUNCTION else self._before

    def _before(self, char: str) -> None:
        if self._reads_tag(char, _FUNCTION):
            self._state = self._function_name

    def _reads_tag(self, char: str, *tags: str) -> str:
        """The tag that is complete with `char`, whitespace before it aside; gives up if none can be."""
        read = (self._read + char).lstrip()
        if not any(tag.startswith(read) for tag in tags):
            self._give_up(char)
            return ""
        self._raw.append(char)
        self._read = "" if read in tags else read
        return read if read in tags else ""

    def _reads_name(self, char: str) -> str:
        """The name that ends before the bracket `char`."""
        if char in "<\n" or len(self._read) > _MAX_NAME:
            self._give_up(char)
            return ""
        self._raw.append(char)
        if char != ">":
            self._read += char
            return ""
        name, self._read = self._read.strip(), ""
        if not name.isprintable() or not name:
            self._give_up()
        return name

    def _function_name(self, char: str) -> None:
        name = self._reads_name(char)
        if name and self._state == self._function_name:
            self._schema = self._schema_of(name)
            self._announce(name)
            self._argue("{")
            self._state = self._between

    def _between(self, char: str) -> None:
        """Before a parameter or the end of the function."""
        tag = self._reads_tag(char, _PARAMETER, _END_FUNCTION)
        if tag == _PARAMETER:
            self._state = self._parameter_name
        elif tag:
            self._argue("}")
            self._complete()
            self._state = self._after

    def _parameter_name(self, char: str) -> None:
        name = self._reads_name(char)
        if name and self._state == self._parameter_name:
            self._key, self._value = name, []
            self._state = self._parameter

    def _parameter(self, char: str) -> None:
        self._raw.append(char)
        self._value.append(char)
        if char == ">" and "".join(self._value[-len(_END_PARAMETER) :]) == _END_PARAMETER:
            text = "".join(self._value[: -len(_END_PARAMETER)])
            # The format puts a line break on either side of the value.
            text = text.removeprefix("\n").removesuffix("\n")
            comma = ", " if self._keys else ""
            self._keys.append(self._key)
            self._argue(f"{comma}{json.dumps(self._key, ensure_ascii=False)}: {self._as_json(text)}")
            self._state = self._between

    def _after(self, char: str) -> None:
        """The closing tag; another function may come without it."""
        self._read += char
        if self._read.lstrip() == _END_CALL:
            self._state = self._text
        elif not _END_CALL.startswith(self._read.lstrip()):
            self._to_text(self._read)

    def _end(self) -> None:
        if self._state == self._after:
            self._raw = [self._read]
        self._give_up()

    def _schema_of(self, name: str) -> dict[str, Any]:
        for tool in self._tools:
            function = tool.get("function", {})
            parameters = function.get("parameters")
            if function.get("name") == name and isinstance(parameters, dict):
                properties = parameters.get("properties")
                return properties if isinstance(properties, dict) else {}
        return {}

    def _as_json(self, text: str) -> str:
        schema = self._schema.get(self._key)
        kind = schema.get("type") if isinstance(schema, dict) else None
        if kind == "string" or (isinstance(kind, list) and "string" in kind and text != "null"):
            return json.dumps(text, ensure_ascii=False)
        try:
            json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return text.lower() if text in ("True", "False") else json.dumps(text, ensure_ascii=False)
        return text


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
