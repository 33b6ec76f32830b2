"""Items of a response's input: checked, given ids, and turned into the messages of a chat."""

import secrets
from typing import Any

from manta.cluster.doors.checks import shown
from manta.cluster.doors.errors import RequestError

_ROLES = ("user", "assistant", "system", "developer")
_KINDS = ("message", "function_call", "function_call_output", "reasoning")
_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
_TEXTS = ("input_text", "output_text", "text")
Item = dict[str, Any]
Message = dict[str, Any]


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(20)}"


def read_input(value: Any) -> list[Item]:
    """The input as a list of items with type and id. Raises RequestError."""
    if value is None:
        raise RequestError("input is required", "input", "missing_required_parameter")
    if isinstance(value, str):
        value = [{"role": "user", "content": [{"type": "input_text", "text": value}]}]
    if not isinstance(value, list):
        raise RequestError(f"input must be a string or a list of items, not {shown(value)}", "input", "invalid_type")
    return [_read_item(item, f"input[{index}]") for index, item in enumerate(value)]


def _read_item(item: Any, where: str) -> Item:
    if not isinstance(item, dict):
        raise RequestError(f"{where} must be an object, not {shown(item)}", where, "invalid_type")
    kind = item.get("type", "message")
    if kind not in _KINDS:
        message = f"{where} has type {shown(kind)}; supported are {', '.join(_KINDS)}"
        raise RequestError(message, f"{where}.type", "unsupported_parameter")
    read = {name: value for name, value in item.items() if value is not None} | {"type": kind}
    if kind == "message":
        _check_message(read, where)
    elif kind == "reasoning":
        _check_reasoning(read, where)
    else:
        _check_texts(read, where, ("call_id", "name", "arguments") if kind == "function_call" else ("call_id",))
        if kind == "function_call_output":
            read["output"] = _parts(read.get("output"), f"{where}.output")
    _check_texts(read, where, ("id",) if "id" in read else ())
    return {"id": new_id(_PREFIXES[kind]), "status": "completed"} | read


def _check_texts(item: Item, where: str, names: tuple[str, ...]) -> None:
    for name in names:
        if not isinstance(item.get(name), str):
            what = "is required" if name not in item else f"must be a string, not {shown(item[name])}"
            code = "missing_required_parameter" if name not in item else "invalid_type"
            raise RequestError(f"{where}.{name} {what}", f"{where}.{name}", code)


def _check_message(item: Item, where: str) -> None:
    role = item.get("role")
    if role not in _ROLES:
        message = f"{where}.role must be one of {', '.join(_ROLES)}, not {shown(role)}"
        raise RequestError(message, f"{where}.role")
    content = _parts(item.get("content"), f"{where}.content")
    if isinstance(content, str):
        extra: dict[str, Any] = {"annotations": []} if role == "assistant" else {}
        content = [{"type": "output_text" if role == "assistant" else "input_text", "text": content} | extra]
    item["content"] = content


def _parts(value: Any, where: str) -> str | list[dict[str, Any]]:
    """A text, or a list of parts that are texts."""
    if value is None:
        raise RequestError(f"{where} is required", where, "missing_required_parameter")
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RequestError(f"{where} must be a string or a list of parts, not {shown(value)}", where, "invalid_type")
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        name = "refusal" if kind == "refusal" else "text"
        if kind not in (*_TEXTS, "refusal"):
            shape = '{"type": "input_text", "text": "..."}'
            message = f"{where}[{index}] has type {shown(kind)}; this model takes text only: {shape}"
            raise RequestError(message, f"{where}[{index}]", "unsupported_parameter")
        if not isinstance(part.get(name), str):
            raise RequestError(f"{where}[{index}].{name} must be a string", f"{where}[{index}].{name}", "invalid_type")
    return value


def _check_reasoning(item: Item, where: str) -> None:
    for name, kind in (("content", "reasoning_text"), ("summary", "summary_text")):
        value = item.setdefault(name, [])
        good = isinstance(value, list) and all(
            isinstance(part, dict) and part.get("type") == kind and isinstance(part.get("text"), str) for part in value
        )
        if not good:
            message = f'{where}.{name} must be a list of {{"type": "{kind}", "text": "..."}}'
            raise RequestError(message, f"{where}.{name}", "invalid_type")
    if item.get("encrypted_content") and not item["content"]:
        message = f"{where} is encrypted by another server and cannot be read here; leave the item out"
        raise RequestError(message, f"{where}.encrypted_content", "unsupported_parameter")


def check_calls(items: list[Item], num_before: int) -> None:
    """Raises RequestError for a result of a call that was not made. The first `num_before` items are not the input's
    own."""
    calls = set()
    for index, item in enumerate(items):
        if item["type"] == "function_call":
            calls.add(item["call_id"])
        elif item["type"] == "function_call_output" and item["call_id"] not in calls:
            where = f"input[{index - num_before}].call_id"
            message = f"{where}: there is no function_call with the call_id {shown(item['call_id'])} before it"
            raise RequestError(message, where)


def chat_messages(items: list[Item], instructions: str | None, knows_developer: bool) -> list[Message]:
    """The messages that a client would send for the same conversation to /v1/chat/completions: what the model said and
    called between two turns of others is one message. `knows_developer`: the chat template has that role."""
    messages: list[Message] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        kind = item["type"]
        if kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])})
        elif kind == "message" and item["role"] != "assistant":
            role = "system" if item["role"] == "developer" and not knows_developer else item["role"]
            messages.append({"role": role, "content": item["content"]})
        else:
            _add_to_answer(messages, item)
    return messages


def _add_to_answer(messages: list[Message], item: Item) -> None:
    kind = item["type"]
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    said = last is not None and ("content" in last or "tool_calls" in last)
    # Reasoning opens an answer; a second text follows on the first only behind calls.
    if last is None or (kind == "reasoning" and said) or (kind == "message" and said and "tool_calls" not in last):
        last = {"role": "assistant"}
        messages.append(last)
    if kind == "reasoning":
        parts = item["content"] or item["summary"]
        last["reasoning_content"] = last.get("reasoning_content", "") + "".join(part["text"] for part in parts)
    elif kind == "message":
        last["content"] = last.get("content", "") + _text(item["content"])
    else:
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        last.setdefault("tool_calls", []).append(call)


def _text(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", part.get("refusal", "")) for part in content)
