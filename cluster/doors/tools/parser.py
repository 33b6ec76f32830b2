"""What all formats of tool calls have in common: text before and between the calls, and calls that prove to be none."""

import re
import uuid
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar

from manta.cluster.doors.tools.events import Arguments, Broken, Call, Content, Event, merged
from manta.cluster.doors.tools.json_call import JsonCallReader
from manta.cluster.doors.tools.json_value import JsonError, JsonValue


@cache
def plain_text(stops: str) -> re.Pattern[str]:
    """Matches as much text as there is without the characters `stops`, up to the last that is not whitespace."""
    none = "".join(re.escape(stop) for stop in stops)
    return re.compile(rf"[^{none}]*[^\s{none}]" if none else r"[\s\S]*\S")


class ToolParser:
    """Turns one answer's text into events. `push` the pieces as they come, then `flush`.

    A parser is a state per format, fed with single characters: what comes out cannot depend on how the text was cut.
    No text is lost but whitespace around calls, and no text raises.
    """

    OPENINGS: ClassVar[tuple[str, ...]] = ()  # texts without whitespace that begin calls, wherever they are
    MARKERS: ClassVar[tuple[str, ...]] = ()  # texts that may be special tokens and must not be left out

    def __init__(self, tools: Sequence[dict[str, Any]] = ()) -> None:
        """`tools` as in the request."""
        self._tools = tools
        self._events: list[Event] = []
        self._state: Callable[[str], None] = self._text
        self._held = ""  # in the text: whitespace, and what may become an opening
        self._plain = plain_text("".join(opening[0] for opening in self.OPENINGS))
        self._raw: list[str] = []  # of the call being read, from before its opening on
        self._num_calls = 0
        self._is_announced = False
        self._follows_call = False

    def push(self, text: str) -> list[Event]:
        position = 0
        while position < len(text):
            end = self._feed_plain(text, position)
            if end == position:
                self._state(text[position])
                end += 1
            position = end
        return self._take_events()

    def flush(self) -> list[Event]:
        """The rest, when the text has ended."""
        if self._state == self._text:
            if not (self._follows_call and self._held.isspace()):
                self._release(self._held)
        else:
            self._end()
        self._held = ""
        return self._take_events()

    def new_id(self) -> str:
        return f"chatcmpl-tool-{uuid.uuid4().hex}"

    def _feed_plain(self, text: str, position: int) -> int:
        """Does for many characters what the state would do with each of them; returns their end."""
        span = self._plain.match(text, position) if not self._held and self._state == self._text else None
        if span is None:
            return position
        self._release(span.group())
        return span.end()

    def _open(self, opening: str) -> None:
        """An opening was read; sets the state that follows."""
        raise NotImplementedError

    def _end(self) -> None:
        """The text has ended in a state of the format."""
        self._give_up()

    def _text(self, char: str) -> None:
        """The state outside of calls."""
        held = self._held + char
        rest = held.lstrip()
        if rest in self.OPENINGS:
            self._held, self._raw = "", [held]
            self._open(rest)
            return
        if not self._may_open(rest):
            self._release(held[: len(held) - len(rest)])
            while not self._may_open(rest):
                self._release(rest[0])
                rest = rest[1:]
            held = rest
        self._held = held

    def _may_open(self, text: str) -> bool:
        text = text.lstrip()
        return not text or any(opening.startswith(text) for opening in self.OPENINGS)

    def _release(self, text: str) -> None:
        if text:
            self._events.append(Content(text))
            self._follows_call = self._follows_call and text.isspace()

    def _announce(self, name: str, call_id: str = "") -> None:
        self._is_announced = True
        self._events.append(Call(self._num_calls, call_id or self.new_id(), name))
        self._num_calls += 1

    def _argue(self, text: str) -> None:
        """More of the arguments of the announced call."""
        self._events.append(Arguments(self._num_calls - 1, text))

    def _complete(self) -> None:
        """The announced call has all its arguments."""
        self._raw, self._is_announced, self._follows_call = [], False, True

    def _give_up(self, char: str = "") -> None:
        """What was read since the opening is no call; `char` comes after it."""
        raw, self._raw = "".join(self._raw), []
        if self._is_announced:
            self._events.append(Broken(self._num_calls - 1, raw))
            self._is_announced = False
            self._follows_call = False
        elif not (self._follows_call and raw.isspace()):
            self._release(raw)
        self._to_text(char)

    def _to_text(self, text: str) -> None:
        self._state = self._text
        for char in text:
            self._state(char)

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return merged(events)


class JsonCallParser(ToolParser):
    """For formats whose calls are JSON; adds the states within an object of name and arguments, and within arguments
    alone."""

    NEEDS_ARGUMENTS: ClassVar[bool] = False

    def _begin_object(self, char: str) -> None:
        self._reader = JsonCallReader(self._announce, self._argue, self.NEEDS_ARGUMENTS)
        self._state = self._object
        self._object(char)

    def _object(self, char: str) -> None:
        try:
            is_done = self._reader.feed(char)
        except JsonError:
            if self._reader.has_call:  # models forget the last bracket
                self._complete()
                self._state = self._after
                self._after(char)
            else:
                self._give_up(char)
            return
        self._raw.append(char)
        if is_done:
            self._complete()
            self._state = self._after

    def _after(self, char: str) -> None:
        """The state behind an object."""
        raise NotImplementedError

    def _begin_arguments(self, name: str, call_id: str = "") -> None:
        """What follows are the arguments alone."""
        self._announce(name, call_id)
        self._value = JsonValue()
        self._state = self._lone_arguments

    def _lone_arguments(self, char: str) -> None:
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

    def _feed_plain(self, text: str, position: int) -> int:
        if self._state == self._object:
            end = self._reader.feed_plain(text, position)
        elif self._state == self._lone_arguments:
            end = self._value.plain_end(text, position)
            self._argue(text[position:end])
        else:
            return super()._feed_plain(text, position)
        self._raw.append(text[position:end])
        return end

    def _end(self) -> None:
        if self._state == self._object and self._reader.has_call:
            self._complete()
        else:
            self._give_up()


class JsonArrayParser(JsonCallParser):
    """For formats whose calls are a JSON array of such objects; begins behind the opening bracket."""

    def _item(self, char: str) -> None:
        """The state before an object of the array."""
        if char.isspace():
            self._raw.append(char)
        elif char == "{":
            self._begin_object(char)
        else:
            self._give_up(char)

    def _after(self, char: str) -> None:
        if char == ",":
            self._raw.append(char)
            self._state = self._item
        elif char == "]":
            self._raw = []
            self._state = self._text
        elif char.isspace():
            self._raw.append(char)
        else:
            self._give_up(char)
