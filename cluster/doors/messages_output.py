"""The content of an answer of the Messages API: blocks, and the events that tell of them."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import orjson

from manta.cluster.doors.tools.events import Arguments, Broken, Call, Content, Event, Reasoning

_DELTAS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking"),
           "tool_use": ("input_json_delta", "partial_json")}  # fmt: skip


class ContentBlocks:
    """What the parsers of an answer find in it becomes blocks; only the last one can still grow.

    In a stream a call that proves broken stays as it was told; else it becomes the text that it is, as in chat.
    """

    def __init__(self, *, streams: bool, shows_thinking: bool) -> None:
        self.num_calls = 0
        self._streams, self._shows_thinking = streams, shows_thinking
        self._blocks: list[dict[str, Any]] = []
        self._pieces: list[str] = []  # of the open block
        self._is_open = False
        self._events: list[bytes] = []

    @property
    def says(self) -> bool:
        """The last block is a text that can grow."""
        return self._is_open and self._blocks[-1]["type"] == "text"

    def push(self, event: Event, logprobs: Sequence[dict[str, Any]] = ()) -> None:
        """This API has no place for log-probabilities."""
        match event:
            case Content(text):
                self._add("text", {"text": ""}, text)
            case Reasoning(text):
                shown = text if self._shows_thinking else ""
                self._add("thinking", {"thinking": "", "signature": ""}, shown)
            case Call(_, call_id, name):
                self._close()
                self._open({"type": "tool_use", "id": call_id, "name": name, "input": {}})
                self.num_calls += 1
            case Arguments(_, text):
                self._extend(text)
            case Broken(_, raw):
                self.num_calls -= 1
                if self._streams:
                    self._close()
                    return
                self._blocks.pop()
                self._reopen()
                self._add("text", {"text": ""}, raw)

    def end(self) -> list[dict[str, Any]]:
        """The whole content."""
        self._close()
        return self._blocks

    def take_events(self) -> bytes:
        """Those since the last time."""
        events, self._events = b"".join(self._events), []
        return events

    def _add(self, kind: str, empty: dict[str, Any], text: str) -> None:
        if not self._is_open or self._blocks[-1]["type"] != kind:
            self._close()
            self._open({"type": kind} | empty)
        self._extend(text)

    def _open(self, block: dict[str, Any]) -> None:
        self._blocks.append(block)
        self._pieces, self._is_open = [], True
        self._tell("content_block_start", {"content_block": block})

    def _extend(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            kind, name = _DELTAS[self._blocks[-1]["type"]]
            self._tell("content_block_delta", {"delta": {"type": kind, name: text}})

    def _close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        block, text = self._blocks[-1], "".join(self._pieces)
        if block["type"] == "tool_use":
            block["input"] = _as_object(text)
        else:
            block[block["type"]] = text
        if block["type"] == "thinking":  # clients send back what has one; nobody looks at it here
            block["signature"] = hashlib.sha256(text.encode()).hexdigest()
            signed = {"type": "signature_delta", "signature": block["signature"]}
            self._tell("content_block_delta", {"delta": signed})
        self._tell("content_block_stop", {})

    def _reopen(self) -> None:
        """The text before what proved to be no call."""
        self._is_open = bool(self._blocks) and self._blocks[-1]["type"] == "text"
        if self._is_open:
            self._pieces = [self._blocks[-1]["text"]]

    def _tell(self, kind: str, fields: dict[str, Any]) -> None:
        if self._streams:
            self._events.append(event_bytes(kind, {"index": len(self._blocks) - 1} | fields))


def event_bytes(kind: str, fields: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind} | fields))


def _as_object(arguments: str) -> dict[str, Any]:
    """The arguments of a call; empty for what a stream told of a call that proved broken."""
    try:
        value = json.loads(arguments, strict=False)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
