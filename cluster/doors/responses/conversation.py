"""What a response is about: the items of its input behind those of the responses before it, as messages of a chat."""

import asyncio
from dataclasses import dataclass
from typing import Any

from manta.cluster.doors.chat import THREAD_MESSAGES
from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.responses.items import Item, Message, chat_messages, check_calls, read_input
from manta.cluster.doors.responses.store import Turn, packed
from manta.cluster.doors.validate import Validator


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: list[Message]
    turn: Turn  # this response's own


async def read_conversation(
    value: Any, instructions: str | None, parent: Turn | None, validator: Validator
) -> Conversation:
    """`value` is the body's input. Raises RequestError. Many items are read in a thread."""
    arguments = (value, instructions, parent, validator)
    is_long = isinstance(value, list) and len(value) > THREAD_MESSAGES
    if is_long or (parent is not None and parent.parent is not None):
        return await asyncio.to_thread(_read, *arguments)
    return _read(*arguments)


def _read(value: Any, instructions: str | None, parent: Turn | None, validator: Validator) -> Conversation:
    most = 2 * validator.limits.max_model_len  # hardly an item takes less than a token
    if isinstance(value, list):
        _check_number(len(value), most)
    own = read_input(value)
    before: list[Item] = [] if parent is None else parent.items()
    _check_number(len(before) + len(own), most)
    items = before + own
    if not items:
        raise RequestError("input must hold at least one item", "input")
    check_calls(items, len(before))
    knows_developer = "developer" in (validator.tokenizer.chat_template or "")
    messages = chat_messages(items, instructions, knows_developer)
    return Conversation(messages, Turn(packed(own), parent))


def _check_number(num_items: int, most: int) -> None:
    if num_items > most:
        message = f"input: a conversation of {num_items} items is longer than this model can read; {most} are possible"
        raise RequestError(message, "input", "context_length_exceeded")
