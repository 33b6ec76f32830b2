"""From items to messages, and which of them a truncated conversation keeps, beside a search through all suffixes."""

import asyncio
import random
from typing import Any

import pytest

from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.responses.items import chat_messages, read_input
from manta.cluster.doors.responses.truncation import fit_messages


def reasoning(text: str) -> dict[str, Any]:
    return {"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]}


def call(name: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": name, "name": name, "arguments": "{}"}


def test_an_answer_is_one_message_and_the_next_one_is_another() -> None:
    items = [
        {"role": "developer", "content": "d"},
        reasoning("a"), reasoning("b"), {"role": "assistant", "content": "c"}, call("f"), call("g"),
        reasoning("h"), call("i"),
        {"type": "function_call_output", "call_id": "f", "output": [{"type": "input_text", "text": "x"}]},
        {"role": "assistant", "content": "one"}, {"role": "assistant", "content": "two"}, call("j"),
        {"role": "assistant", "content": "three"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "in short"}]},
        {"role": "user", "content": "u"},
    ]  # fmt: skip
    told = []
    for message in chat_messages(read_input(items), "be brief", knows_developer=False):
        content = message.get("content", "")
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        names = [one["function"]["name"] for one in message.get("tool_calls", [])]
        told.append((message["role"], message.get("reasoning_content", ""), text, names))
    assert told == [
        ("system", "", "be brief", []),
        ("system", "", "d", []),
        ("assistant", "ab", "c", ["f", "g"]),
        ("assistant", "h", "", ["i"]),
        ("tool", "", "x", []),
        ("assistant", "", "one", []),
        ("assistant", "", "twothree", ["j"]),
        ("assistant", "in short", "", []),
        ("user", "", "u", []),
    ]
    assert chat_messages(read_input(items), None, knows_developer=True)[0]["role"] == "developer"


def test_truncation_keeps_as_much_as_fits() -> None:
    draws = random.Random(3)
    num_cut = 0
    for _ in range(300):
        roles = draws.choices(["user", "assistant", "tool"], k=draws.randrange(12))
        messages = [{"role": "system", "content": "s"}] * draws.randrange(3)
        messages += [{"role": role, "content": "x" * draws.randrange(1, 30)} for role in ["user", *roles]]
        limit = draws.randrange(1, 150)

        def size(kept: list[dict[str, Any]]) -> int:
            return sum(len(message["content"]) for message in kept)

        async def resolve(kept: list[dict[str, Any]], limit: int = limit) -> list[dict[str, Any]]:
            if size(kept) > limit:
                raise RequestError("too long", code="context_length_exceeded")
            return kept

        first = [message for message in messages if message["role"] == "system"]
        rest = messages[len(first) :]
        last = max(index for index, message in enumerate(rest) if message["role"] == "user")
        possible = [first + rest[i:] for i in range(last + 1) if rest[i]["role"] != "tool"]
        fitting = [kept for kept in possible if size(kept) <= limit]
        for most in (10**9, limit):
            if fitting:
                assert asyncio.run(fit_messages(messages, most, resolve)) == fitting[0]
            else:
                with pytest.raises(RequestError, match="too long"):
                    asyncio.run(fit_messages(messages, most, resolve))
        num_cut += bool(fitting) and len(fitting[0]) < len(messages)
    assert num_cut > 50
