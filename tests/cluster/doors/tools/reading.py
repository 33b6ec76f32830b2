"""Runs parsers over texts that are cut in any way."""

import keyword
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hypothesis import strategies as st

from manta.cluster.doors.answer import message_body
from manta.cluster.doors.tools.events import Call, Event, merged


class Parser(Protocol):
    def push(self, text: str) -> list[Event]: ...

    def flush(self) -> list[Event]: ...


def read(parser: Parser, pieces: Sequence[str]) -> list[Event]:
    """All events, joined; ids are left out because they are random."""
    events = [event for piece in pieces for event in parser.push(piece)] + parser.flush()
    for event in events:
        if isinstance(event, Call):
            event.id = ""
    return merged(events)


def message_of(parser: Parser, text: str) -> tuple[str | None, list[tuple[str, str]]]:
    """Content and calls (name, arguments) of the finished answer."""
    body = message_body(read(parser, [text]))
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in body.get("tool_calls", [])]
    return body["content"], calls


def pieces_of(text: str, cuts: Sequence[int]) -> list[str]:
    places = sorted({cut % (len(text) + 1) for cut in cuts})
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


def all_pairs(new: Callable[[], Parser], text: str) -> None:
    """Every cut in two, and single characters, read as the whole."""
    whole = read(new(), [text])
    assert read(new(), list(text)) == whole
    for cut in range(len(text) + 1):
        assert read(new(), [text[:cut], text[cut:]]) == whole


CUTS = st.lists(st.integers(0, 10**6), max_size=8)
NAMES = st.from_regex(r"[a-z_][a-zA-Z0-9_]{0,8}", fullmatch=True).filter(lambda name: not keyword.iskeyword(name))
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=3)
