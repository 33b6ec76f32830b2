"""What the text of an answer turns into: reasoning, content, and calls of tools, piece by piece."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby


@dataclass(slots=True)
class Content:
    text: str


@dataclass(slots=True)
class Reasoning:
    text: str


@dataclass(slots=True)
class Call:
    """A call begins: its place among the calls of the answer, its id and the function's name."""

    index: int
    id: str
    name: str


@dataclass(slots=True)
class Arguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(slots=True)
class Broken:
    """What began as call `index` cannot be one: `raw` is all text of it, from its first marker on.

    Who has told of the call already leaves it as it is; who has not writes `raw` as content instead of it.
    """

    index: int
    raw: str


Event = Content | Reasoning | Call | Arguments | Broken


def merged(events: Iterable[Event]) -> list[Event]:
    """The same events with neighbouring texts of one kind joined, and without empty texts."""
    result: list[Event] = []
    for (kind, index), group in groupby(events, lambda event: (type(event), getattr(event, "index", 0))):
        if kind is Call or kind is Broken:
            result += group
            continue
        text = "".join(event.text for event in group if not isinstance(event, Call | Broken))
        if text and kind is Arguments:
            result.append(Arguments(index, text))
        elif text:
            result.append(Content(text) if kind is Content else Reasoning(text))
    return result
