"""Bodies of the Anthropic Messages API: what they ask for in the words of our own chat door, and how answers look."""

from typing import Any

from manta.cluster.doors.errors import Kind, RequestError
from manta.cluster.doors.fields import unknown_field
from manta.cluster.doors.validate import shown

_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "max_tokens": "max_tokens"}
_USED = frozenset({"model", "messages", "system", "stop_sequences", "stream", *_SAMPLING})
_COUNTED = frozenset({"model", "messages", "system"})
# Change nothing about the text, or ask for nothing when they hold these values.
_IGNORED = frozenset({"metadata", "service_tier", "cache_control", "container", "inference_geo"})
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ({"type": "none"},),
    "thinking": ({"type": "disabled"},),
    "output_config": ({},),
    "mcp_servers": ([],),
}
_ERROR_TYPES = {
    Kind.INVALID: "invalid_request_error",
    Kind.UNAUTHENTICATED: "authentication_error",
    Kind.NOT_FOUND: "not_found_error",
    Kind.TOO_LARGE: "request_too_large",
    Kind.OVERLOADED: "overloaded_error",
    Kind.UNAVAILABLE: "overloaded_error",
}


def read_body(body: dict[str, Any], *, only_counts: bool = False) -> dict[str, Any]:
    """The fields that are used and not null. Raises RequestError naming the first other one that means something."""
    used = _COUNTED if only_counts else _USED
    harmless = _IGNORED | (_USED if only_counts else frozenset())
    for name, value in body.items():
        if value is None or name in used or name in harmless:
            continue
        if name not in _NEUTRAL:
            raise unknown_field(name, used | harmless | _NEUTRAL.keys(), used)
        if value not in _NEUTRAL[name]:
            raise RequestError(f"{name} is not supported by this server", name, "unsupported_parameter")
    given = {name: value for name, value in body.items() if name in used and value is not None}
    for name in ("model", "messages") if only_counts else ("model", "messages", "max_tokens"):
        if name not in given:
            raise RequestError(f"{name} is required", name, "missing_required_parameter")
    return given


def chat_messages(given: dict[str, Any]) -> list[dict[str, str]]:
    """The conversation with string contents, the system prompt first. Raises RequestError."""
    messages = given["messages"]
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list of at least one object", "messages", "invalid_type")
    chat = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    system = given.get("system", "")
    return [{"role": "system", "content": _text(system, "system")}, *chat] if system else chat


def sampling_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Under the names of SamplingParams; values unchecked."""
    sampling = {ours: given[theirs] for theirs, ours in _SAMPLING.items() if theirs in given}
    stops = given.get("stop_sequences", [])
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        message = f"stop_sequences must be a list of strings, not {shown(stops)}"
        raise RequestError(message, "stop_sequences", "invalid_type")
    return sampling | {"stop": stops} if stops else sampling


def stop_fields(finish_reason: str | None, stop_reason: str | int | None) -> dict[str, Any]:
    """`stop_reason` and `stop_sequence` for what ended a completion."""
    if isinstance(stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_reason}
    return {"stop_reason": "max_tokens" if finish_reason == "length" else "end_turn", "stop_sequence": None}


def usage_body(counts: dict[str, int]) -> dict[str, int]:
    """`usage` of counts as `Usage.counts` gives them: tokens found in the cache are told apart from the others."""
    cached = counts["cached_tokens"]
    return {
        "input_tokens": counts["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": counts["completion_tokens"],
    }


def error_body(error: RequestError, request_id: str) -> dict[str, Any]:
    inner = {"type": _ERROR_TYPES.get(error.kind, "api_error"), "message": error.message}
    return {"type": "error", "error": inner, "request_id": request_id}


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RequestError(f"{where} must be an object with role and content", where, "invalid_type")
    role = message.get("role")
    if role not in ("user", "assistant", "system"):
        raise RequestError(f'{where}.role must be "user" or "assistant", not {shown(role)}', f"{where}.role")
    if message.get("content") is None:
        raise RequestError(f"{where}.content is required", f"{where}.content", "missing_required_parameter")
    return {"role": role, "content": _text(message["content"], f"{where}.content")}


def _text(content: Any, where: str) -> str:
    """A string, or the texts of a list of blocks one below the other."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of blocks", where, "invalid_type")
    return "\n".join(_block_text(block, f"{where}[{index}]") for index, block in enumerate(content))


def _block_text(block: Any, where: str) -> str:
    if isinstance(block, dict) and block.get("type") == "text" and isinstance(block.get("text"), str):
        return str(block["text"])
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "text":
        raise RequestError(f"{where}.text must be a string", f"{where}.text", "invalid_type")
    raise RequestError(f'{where} has type {kind!r}; this model takes {{"type": "text", "text": "..."}}', where)
