"""truncation="auto": the oldest messages of a conversation go until the rest fits the context."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.responses.items import Message

T = TypeVar("T")


async def fit_messages(
    messages: list[Message], max_characters: int, resolve: Callable[[list[Message]], Awaitable[T]]
) -> T:
    """What `resolve` makes of as many of the last messages as it takes.

    Messages of the system that begin the conversation stay, and so does what follows the last message of the user from
    there on; an answer is not parted from the results of its calls. `max_characters` is more than any prompt can have.
    Raises the RequestError of `resolve`.
    """
    num_first = next((i for i, one in enumerate(messages) if one["role"] != "system"), len(messages))
    first, rest = messages[:num_first], messages[num_first:]
    users = [index for index, one in enumerate(rest) if one["role"] == "user"]
    last = users[-1] if users else 0
    starts = [index for index, one in enumerate(rest) if index <= last and one["role"] != "tool"]
    if not starts:
        return await resolve(messages)
    starts = _short_enough(rest, starts, max_characters)
    try:
        return await resolve(first + rest[starts[0] :])
    except RequestError as error:
        if error.code != "context_length_exceeded" or len(starts) == 1:
            raise
    low, high = 1, len(starts) - 1  # the first start that fits is between them, or none does
    fitting: T | None = None
    while low <= high:
        middle = (low + high) // 2
        try:
            fitting = await resolve(first + rest[starts[middle] :])
            high = middle - 1
        except RequestError as error:
            if error.code != "context_length_exceeded":
                raise
            low = middle + 1
    return fitting if fitting is not None else await resolve(first + rest[starts[-1] :])


def _short_enough(messages: list[Message], starts: list[int], max_characters: int) -> list[int]:
    """Those of the starts, or the last one, from which on the contents have so many characters at most."""
    from_here, total = [0] * len(messages), 0
    for index in range(len(messages) - 1, -1, -1):
        content: Any = messages[index].get("content") or ""
        total += len(content) if isinstance(content, str) else sum(len(part.get("text", "")) for part in content)
        from_here[index] = total
    return [start for start in starts if from_here[start] <= max_characters] or starts[-1:]
