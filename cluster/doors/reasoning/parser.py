"""Parts an answer into what the model thinks and what it says: thinking is between two tags, at the beginning."""

from collections.abc import Callable

from manta.cluster.doors.tools.events import Content, Event, Reasoning, merged
from manta.cluster.doors.tools.parser import plain_text


class ReasoningParser:
    """Turns one answer's text into events. `push` the pieces as they come, then `flush`.

    Fed with single characters, so what comes out cannot depend on how the text was cut. The tags are left out, and
    whitespace beside them.
    """

    def __init__(self, start: str, end: str, is_open: bool) -> None:
        """`is_open`: the text begins within the tags, because the prompt ends with `start` or the model never writes
        it; if it is written nevertheless, it is left out."""
        self._start, self._end, self._is_open = start, end, is_open
        self._events: list[Event] = []
        self._held = ""
        self._plain = plain_text(end[0])
        self._num_read = 0  # characters
        self._thought_end: int | None = None
        self._state: Callable[[str], None] = self._before

    @property
    def num_thought_characters(self) -> int:
        """How much of the text so far is thinking, tags included."""
        return self._num_read if self._thought_end is None else self._thought_end

    def push(self, text: str) -> list[Event]:
        position, start = 0, self._num_read
        self._num_read += len(text)
        while position < len(text):
            if self._state == self._content:
                self._events.append(Content(text[position:]))
                break
            if not self._held and self._state == self._thought:  # as single characters would do, but faster
                span = self._plain.match(text, position)
                if span is not None:
                    self._events.append(Reasoning(span.group()))
                    position = span.end()
                    continue
            self._state(text[position])
            position += 1
            if self._thought_end is None and self._state in (self._behind, self._content):
                self._thought_end = start + position if self._state == self._behind else 0
        return self._take_events()

    def flush(self) -> list[Event]:
        """The rest, when the text has ended."""
        if self._held:
            is_thought = self._state != self._before or self._is_open
            self._events.append(Reasoning(self._held) if is_thought else Content(self._held))
            if not is_thought:
                self._thought_end = 0
            self._held = ""
        return self._take_events()

    def _before(self, char: str) -> None:
        held = self._held = self._held + char
        if held.lstrip() == self._start:
            self._held, self._state = "", self._first
        elif not self._start.startswith(held.lstrip()):
            self._held = ""
            if not self._is_open:
                self._state = self._content
                self._events.append(Content(held))
                return
            self._state = self._first
            for each in held:
                self._state(each)

    def _first(self, char: str) -> None:
        """Before the first visible character within the tags."""
        if not char.isspace():
            self._state = self._thought
            self._thought(char)

    def _thought(self, char: str) -> None:
        """Holds back whitespace, and what may become the end tag."""
        held = self._held + char
        rest = held.lstrip()
        if rest == self._end:
            self._held, self._state = "", self._behind
            return
        if not self._end.startswith(rest):
            self._events.append(Reasoning(held[: len(held) - len(rest)]))
            while not self._end.startswith(rest.lstrip()):
                self._events.append(Reasoning(rest[0]))
                rest = rest[1:]
            held = rest
        self._held = held

    def _behind(self, char: str) -> None:
        """Before the first visible character behind the tags."""
        if not char.isspace():
            self._state = self._content
            self._events.append(Content(char))

    def _content(self, char: str) -> None:
        self._events.append(Content(char))

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return merged(events)
