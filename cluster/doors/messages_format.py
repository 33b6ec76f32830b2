"""Bodies of the Anthropic Messages API: their fields and sampling, and how ends of answers and errors look."""

from typing import Any

from manta.cluster.doors.checks import shown
from manta.cluster.doors.errors import Kind, RequestError
from manta.cluster.doors.fields import unknown_field

_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "max_tokens": "max_tokens"}
_COUNTED = frozenset({"model", "messages", "system", "tools", "tool_choice", "thinking", "output_config"})
_USED = _COUNTED | {"stop_sequences", "stream", *_SAMPLING}
# Change nothing about the text, or ask for nothing when they hold these values.
_IGNORED = frozenset({"metadata", "service_tier", "cache_control", "container", "inference_geo"})
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "mcp_servers": ([],),
    "context_management": ({},),
    "speed": ("standard",),
    "diagnostics": (),
    "user_profile_id": (),
    "workspace_id": (),
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


def sampling_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Under the names of SamplingParams; values unchecked."""
    sampling = {ours: given[theirs] for theirs, ours in _SAMPLING.items() if theirs in given}
    stops = given.get("stop_sequences", [])
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        message = f"stop_sequences must be a list of strings, not {shown(stops)}"
        raise RequestError(message, "stop_sequences", "invalid_type")
    return sampling | {"stop": stops} if stops else sampling


def stop_fields(finish_reason: str, stop_reason: str | int | None, has_calls: bool) -> dict[str, Any]:
    """`stop_reason` and `stop_sequence` for what ended a completion."""
    if isinstance(stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_reason}
    if finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    return {"stop_reason": "tool_use" if has_calls else "end_turn", "stop_sequence": None}


def usage_body(counts: dict[str, int]) -> dict[str, Any]:
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
