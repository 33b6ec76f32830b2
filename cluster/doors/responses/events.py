"""The semantic events of a response, numbered, and the log of those that are kept for later readers."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import orjson

_EVENTS_AT_ONCE = 256  # as many as a reader of the log gets in one piece


class EventWriter:
    """Encodes events; `take` gives those since the last time."""

    def __init__(self) -> None:
        self._num_events = 0
        self._new: list[bytes] = []

    def write(self, kind: str, fields: dict[str, Any]) -> None:
        body = {"type": kind, **fields, "sequence_number": self._num_events}
        self._new.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(body)))
        self._num_events += 1

    def take(self) -> list[bytes]:
        new, self._new = self._new, []
        return new


class EventLog:
    """All events of one response, for any number of readers. Each has a place in the log; nothing is kept for it."""

    def __init__(self) -> None:
        self.is_complete = False
        self.num_bytes = 0
        self._events: list[bytes] = []
        self._changed = asyncio.Event()

    def append(self, events: list[bytes], *, is_last: bool = False) -> None:
        self._events += events
        self.num_bytes += sum(map(len, events))
        self.is_complete = is_last
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def read(self, start: int) -> AsyncGenerator[bytes, None]:
        """The events from number `start` on, several at a time, until the last."""
        while True:
            if start < len(self._events):
                events = self._events[start : start + _EVENTS_AT_ONCE]
                start += len(events)
                yield b"".join(events)
            elif self.is_complete:
                return
            else:
                await self._changed.wait()
