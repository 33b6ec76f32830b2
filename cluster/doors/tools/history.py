"""Calls and their results among the messages of a conversation, checked and as chat templates want them."""

import json
from typing import Any

from manta.cluster.doors.checks import shown
from manta.cluster.doors.errors import RequestError

_REASONING = ("reasoning_content", "reasoning")


def check_history(message: dict[str, Any], where: str) -> dict[str, Any]:
    """The message without keys that hold null. Arguments become objects, reasoning goes by both of its names.

    Raises RequestError.
    """
    message = {key: value for key, value in message.items() if value is not None}
    calls = message.pop("tool_calls", [])
    if not isinstance(calls, list):
        raise RequestError(f"{where}.tool_calls must be a list", f"{where}.tool_calls", "invalid_type")
    if calls:
        message["tool_calls"] = [_check_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    call_id = message.get("tool_call_id", "")
    if not isinstance(call_id, str):
        raise RequestError(f"{where}.tool_call_id must be a string", f"{where}.tool_call_id", "invalid_type")
    thought = next((message[name] for name in _REASONING if name in message), None)
    if message["role"] == "assistant" and isinstance(thought, str):
        message = dict.fromkeys(_REASONING, thought) | message
    return message


def _check_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        message = f'{where} must be {{"id", "type": "function", "function": {{"name", "arguments"}}}}'
        raise RequestError(message, where, "invalid_type")
    for key, value in (("function.name", function.get("name")), ("id", call.get("id", ""))):
        if not isinstance(value, str):
            raise RequestError(f"{where}.{key} must be a string", f"{where}.{key}", "invalid_type")
    param = f"{where}.function.arguments"
    return dict(call) | {"type": "function", "function": function | {"arguments": _as_object(function, param)}}


def _as_object(function: dict[str, Any], param: str) -> dict[str, Any]:
    arguments: Any = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{param} is no JSON: {error}", param)
    if not isinstance(arguments, dict):
        raise RequestError(f"{param} must be the JSON text of an object, not {shown(arguments)}", param)
    return arguments


def with_argument_texts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with the arguments as JSON texts, for templates that join them to other texts."""
    return [message | {"tool_calls": _texts(message["tool_calls"])} if "tool_calls" in message else message
            for message in messages]  # fmt: skip


def _texts(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        call
        | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in calls
    ]
