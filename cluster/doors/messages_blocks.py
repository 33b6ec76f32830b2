"""The conversation of a Messages call, block by block, as the messages of a chat."""

from typing import Any

from manta.cluster.doors.checks import shown
from manta.cluster.doors.errors import RequestError

_OF_USERS = ("text", "tool_result")
_OF_ASSISTANTS = ("text", "tool_use", "thinking")
Message = dict[str, Any]


def chat_messages(given: dict[str, Any]) -> list[Message]:
    """The system prompt first; results of tools are messages of their own. Raises RequestError."""
    messages = given["messages"]
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list of at least one object", "messages", "invalid_type")
    system = given.get("system", "")
    chat: list[Message] = [{"role": "system", "content": _plain_text(system, "system")}] if system else []
    calls: set[str] = set()
    for index, message in enumerate(messages):
        chat += _messages_of(message, f"messages[{index}]", calls)
    if chat[-1].get("tool_calls"):
        where = f"messages[{len(messages) - 1}]"
        raise RequestError(f"{where} ends with tool_use; the next message must bring its tool_result", where)
    return chat


def _messages_of(message: Any, where: str, calls: set[str]) -> list[Message]:
    """`calls` are the ids of the calls so far."""
    if not isinstance(message, dict):
        raise RequestError(f"{where} must be an object with role and content", where, "invalid_type")
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise RequestError(f'{where}.role must be "user" or "assistant", not {shown(role)}', f"{where}.role")
    where = f"{where}.content"
    if content is None:
        raise RequestError(f"{where} is required", where, "missing_required_parameter")
    if isinstance(content, str) or role == "system":
        return [{"role": role, "content": _plain_text(content, where)}]
    blocks = _blocks(content, where)
    if role == "assistant":
        return [_answer(blocks, where, calls)]
    return _turn_of_user(blocks, where, calls)


def _turn_of_user(blocks: list[dict[str, Any]], where: str, calls: set[str]) -> list[Message]:
    chat: list[Message] = []
    texts: list[str] = []  # of the latest message, joined at once: a turn may have a million blocks
    for index, block in enumerate(blocks):
        place = f"{where}[{index}]"
        is_result = _kind(block, place, _OF_USERS) == "tool_result"
        if is_result and texts:
            chat.append({"role": "user", "content": "\n".join(texts)})
            texts = []
        if is_result:
            chat.append(_result(block, place, calls))
        else:
            texts.append(_string(block, "text", place))
    if texts:
        chat.append({"role": "user", "content": "\n".join(texts)})
    return chat or [{"role": "user", "content": ""}]


def _answer(blocks: list[dict[str, Any]], where: str, calls: set[str]) -> Message:
    texts, thoughts, tool_calls = [], [], []
    for index, block in enumerate(blocks):
        place = f"{where}[{index}]"
        kind = _kind(block, place, _OF_ASSISTANTS)
        if kind == "text":
            texts.append(_string(block, "text", place))
        elif kind == "thinking":
            thoughts.append(_string(block, "thinking", place))
        else:
            tool_calls.append(_call(block, place))
            calls.add(block["id"])
    message: Message = {"role": "assistant", "content": "\n".join(texts)}
    if any(thoughts):
        message["reasoning_content"] = "".join(thoughts)
    return message | {"tool_calls": tool_calls} if tool_calls else message


def _call(block: dict[str, Any], where: str) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise RequestError(f"{where}.input must be an object, not {shown(arguments)}", f"{where}.input", "invalid_type")
    function = {"name": _string(block, "name", where), "arguments": arguments}
    return {"id": _string(block, "id", where), "type": "function", "function": function}


def _result(block: dict[str, Any], where: str, calls: set[str]) -> Message:
    call_id = _string(block, "tool_use_id", where)
    if call_id not in calls:
        message = f"{where}.tool_use_id: there is no tool_use with the id {shown(call_id)} before it"
        raise RequestError(message, f"{where}.tool_use_id")
    text = _plain_text(block.get("content") or "", f"{where}.content")
    if block.get("is_error"):  # chat templates have no other place for it
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def _plain_text(content: Any, where: str) -> str:
    """A string, or the texts of a list of text blocks one below the other."""
    if isinstance(content, str):
        return content
    texts = []
    for index, block in enumerate(_blocks(content, where)):
        _kind(block, f"{where}[{index}]", ("text",))
        texts.append(_string(block, "text", f"{where}[{index}]"))
    return "\n".join(texts)


def _blocks(content: Any, where: str) -> list[Any]:
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of blocks", where, "invalid_type")
    return content


def _kind(block: Any, where: str, possible: tuple[str, ...]) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind in possible:
        return str(kind)
    message = f"{where} has type {shown(kind)}; possible here: {', '.join(possible)}"
    if kind in ("image", "document"):
        message += " (this model takes text only)"
    elif kind == "redacted_thinking":
        message += " (thinking that another server has encrypted cannot be read; leave the block out)"
    raise RequestError(message, where, "unsupported_parameter")


def _string(block: dict[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{name} must be a string, not {shown(value)}", f"{where}.{name}", "invalid_type")
    return value
