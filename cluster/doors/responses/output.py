"""The output of a response as it grows: items, and the events that tell of them."""

from collections.abc import Callable, Sequence
from typing import Any

from manta.cluster.doors.responses.items import Item, new_id
from manta.cluster.doors.tools.events import Arguments, Broken, Call, Content, Event, Reasoning

Tell = Callable[[str, dict[str, Any]], None]  # kind and fields of an event
_TEXT_KINDS = {"message": "output_text", "reasoning": "reasoning_text"}


class OutputItems:
    """What the parsers of an answer find in it becomes items; only the last one can still grow.

    With `tell` every step is told. A call that proves broken was told then, and stays as an incomplete item; without
    `tell` it becomes the text that it is, as in a chat answer.
    """

    def __init__(self, tell: Tell | None = None) -> None:
        self._tell = tell
        self._items: list[Item] = []
        self._pieces: list[str] = []  # text or arguments of the open item
        self._logprobs: list[dict[str, Any]] = []
        self._is_open = False

    def push(self, event: Event, logprobs: Sequence[dict[str, Any]] = ()) -> None:
        """`logprobs` are those of the tokens of a Content."""
        match event:
            case Content(text):
                self._text("message", text, logprobs)
            case Reasoning(text):
                self._text("reasoning", text)
            case Call(_, call_id, name):
                self._open({"type": "function_call", "call_id": call_id, "name": name, "arguments": ""}, "fc")
            case Arguments(_, text):
                self._pieces.append(text)
                self._say("function_call_arguments.delta", {"delta": text})
            case Broken(_, raw) if self._tell is None:
                self._items.pop()
                self._reopen()
                self._text("message", raw)
            case Broken():
                self._close("incomplete")

    def end(self, status: str) -> None:
        """`status` of the last item. An answer without anything is an empty message."""
        if not self._items:
            self._text("message", "")
        self._close(status)

    @property
    def says(self) -> bool:
        """The last item is a message that can grow."""
        return self._is_open and self._items[-1]["type"] == "message"

    def items(self) -> list[Item]:
        """As they are now."""
        if self._is_open:
            self._fill()
        return self._items

    def _text(self, kind: str, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> None:
        if not self._is_open or self._items[-1]["type"] != kind:
            if kind == "message":
                self._open({"type": kind, "role": "assistant", "content": []}, "msg")
            else:
                self._open({"type": kind, "summary": [], "content": []}, "rs")
            self._items[-1]["content"].append(self._new_part(kind))
            self._say("content_part.added", {"content_index": 0, "part": self._new_part(kind)})
        self._pieces.append(text)
        self._logprobs += logprobs
        if text or logprobs:
            extra = {"logprobs": logprobs} if kind == "message" else {}
            self._say(f"{_TEXT_KINDS[kind]}.delta", {"content_index": 0, "delta": text, **extra})

    def _new_part(self, kind: str) -> dict[str, Any]:
        part: dict[str, Any] = {"type": _TEXT_KINDS[kind], "text": ""}
        return part | {"annotations": [], "logprobs": []} if kind == "message" else part

    def _open(self, item: Item, prefix: str) -> None:
        self._close("completed")
        self._items.append({"id": new_id(prefix), "status": "in_progress"} | item)
        self._pieces, self._logprobs, self._is_open = [], [], True
        if self._tell is not None:
            self._tell("response.output_item.added", {"output_index": len(self._items) - 1, "item": self._items[-1]})

    def _reopen(self) -> None:
        """The text before what proved to be no call."""
        self._is_open = bool(self._items) and self._items[-1]["type"] == "message"
        if self._is_open:
            part = self._items[-1]["content"][0]
            self._pieces, self._logprobs = [part["text"]], part["logprobs"]

    def _fill(self) -> None:
        """Writes what was collected into the open item."""
        item, text = self._items[-1], "".join(self._pieces)
        self._pieces = [text]
        if item["type"] == "function_call":
            item["arguments"] = text
            return
        item["content"][0]["text"] = text
        if item["type"] == "message":
            item["content"][0]["logprobs"] = self._logprobs

    def _close(self, status: str) -> None:
        if not self._is_open:
            return
        self._fill()
        item = self._items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            done = {"arguments": item["arguments"], "name": item["name"]}
            self._say("function_call_arguments.done", done)
        else:
            part = item["content"][0]
            extra = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            self._say(f"{part['type']}.done", {"content_index": 0, "text": part["text"], **extra})
            self._say("content_part.done", {"content_index": 0, "part": part})
        self._is_open = False
        if self._tell is not None:
            self._tell("response.output_item.done", {"output_index": len(self._items) - 1, "item": item})

    def _say(self, kind: str, fields: dict[str, Any]) -> None:
        """An event about the last item."""
        if self._tell is not None:
            place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
            self._tell(f"response.{kind}", place | fields)
