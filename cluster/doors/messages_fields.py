"""Fields of a Messages call that are about tools, thinking and the form of answers, as fields of a chat call."""

import re
from dataclasses import dataclass
from typing import Any

from manta.cluster.doors.checks import check_bool, check_int, shown
from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.response_format import apply_response_format
from manta.cluster.doors.responses.settings import effort_arguments
from manta.cluster.doors.responses.small_objects import check_object
from manta.cluster.doors.text import Tokenizer
from manta.cluster.doors.tools.request import check_num_tools
from manta.configs.schema import ServeConfig

_TOOL_FIELDS = {"type", "name", "description", "input_schema", "cache_control", "strict", "eager_input_streaming"}
_NEUTRAL_TOOL_FIELDS = {"defer_loading": False, "input_examples": [], "allowed_callers": ["direct"]}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


@dataclass(frozen=True, slots=True)
class Thinking:
    is_on: bool = False
    is_shown: bool = True  # else its blocks are empty


def tool_fields(given: dict[str, Any]) -> dict[str, Any]:
    """tools, tool_choice and parallel_tool_calls of a chat body. Raises RequestError."""
    tools = given.get("tools", [])
    if not isinstance(tools, list):
        raise RequestError(f"tools must be a list, not {shown(tools)}", "tools", "invalid_type")
    check_num_tools(tools)
    chat: dict[str, Any] = {"tools": [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]}
    choice = given.get("tool_choice")
    if choice is None:
        return chat
    kind = choice.get("type") if isinstance(choice, dict) else None
    known = {"type"} | ({"name"} if kind == "tool" else set())
    if isinstance(kind, str) and kind in _CHOICES:
        chat["tool_choice"] = _CHOICES[kind]
    elif kind == "tool":
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    else:
        message = f'tool_choice.type must be "auto", "any", "tool" or "none", not {shown(kind)}'
        raise RequestError(message, "tool_choice")
    if kind == "any" and not tools:
        raise RequestError("tool_choice of type 'any' needs tools", "tool_choice")
    check_object(choice, "tool_choice", known | {"disable_parallel_tool_use"})
    is_single = check_bool(choice.get("disable_parallel_tool_use", False), "tool_choice.disable_parallel_tool_use")
    return chat | {"parallel_tool_calls": not is_single}


def _tool(tool: Any, where: str) -> dict[str, Any]:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind not in (None, "custom"):
        message = f"{where} has type {shown(kind)}, which is not supported: give tools with an input_schema"
        raise RequestError(message, f"{where}.type", "unsupported_parameter")
    check_object(tool, where, _TOOL_FIELDS | _NEUTRAL_TOOL_FIELDS.keys())
    for name, neutral in _NEUTRAL_TOOL_FIELDS.items():
        if tool.get(name) not in (None, neutral):
            raise RequestError(f"{where}.{name} is not supported by this server", where, "unsupported_parameter")
    if not isinstance(tool.get("input_schema"), dict):
        message = f"{where}.input_schema must be an object: a JSON schema"
        raise RequestError(message, f"{where}.input_schema", "invalid_type")
    function = {"name": tool.get("name"), "description": tool.get("description"), "parameters": tool["input_schema"]}
    # In the order in which clients of chat write it: models see it.
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def read_thinking(given: dict[str, Any], config: ServeConfig) -> Thinking:
    """Raises RequestError. budget_tokens is checked only: the model ends its thinking itself."""
    asked = check_object(given.get("thinking", {}), "thinking", {"type", "budget_tokens", "display"})
    kind, display = asked.get("type", "disabled"), asked.get("display")
    if kind not in ("enabled", "adaptive", "disabled"):
        message = f"thinking.type must be 'enabled', 'adaptive' or 'disabled', not {shown(kind)}"
        raise RequestError(message, "thinking.type")
    if display not in (None, "summarized", "omitted"):
        raise RequestError("thinking.display must be 'summarized' or 'omitted'", "thinking.display")
    if kind == "disabled":
        return Thinking()
    if config.reasoning_parser is None:
        message = "thinking is not supported: the server was started without --reasoning-parser"
        raise RequestError(message, "thinking", "unsupported_parameter")
    if kind == "enabled":
        budget = check_int(asked.get("budget_tokens"), "thinking.budget_tokens", 1, 2**31 - 1)
        most = given.get("max_tokens")
        if isinstance(most, int) and budget >= most:
            raise RequestError(f"thinking.budget_tokens must be below max_tokens={most}", "thinking.budget_tokens")
    choice = given.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") in ("any", "tool"):
        message = "thinking does not go with a tool_choice that forces a call, which is all of an answer"
        raise RequestError(message, "thinking")
    return Thinking(True, display != "omitted")


def template_arguments(given: dict[str, Any], thinking: Thinking, tokenizer: Tokenizer) -> dict[str, Any]:
    """Thinking is off unless it is asked for, where the chat template knows how. Raises RequestError."""
    knows = "enable_thinking" in (tokenizer.chat_template or "")
    arguments: dict[str, Any] = {"enable_thinking": thinking.is_on} if knows else {}
    effort = check_object(given.get("output_config", {}), "output_config", {"effort", "format"}).get("effort")
    if effort is not None:
        arguments = effort_arguments(effort, "output_config.effort", tokenizer) | arguments
    return arguments


def apply_output_format(given: dict[str, Any], sampling: dict[str, Any]) -> None:
    """Adds to `sampling` what output_config.format asks for. Raises RequestError."""
    form = given.get("output_config", {}).get("format")
    if form is None:
        return
    where = "output_config.format"
    check_object(form, where, {"type", "schema"})
    if form.get("type") != "json_schema":
        raise RequestError(f"{where}.type must be 'json_schema', not {shown(form.get('type'))}", f"{where}.type")
    wrapped = {"type": "json_schema", "json_schema": {"name": "answer", "schema": form.get("schema")}}
    apply_response_format({"response_format": wrapped}, sampling)


def retold(error: RequestError) -> RequestError:
    """An error of the chat call underneath, in the words of this API."""
    for ours, theirs in (
        ("response_format.json_schema", "output_config.format"),
        ("response_format", "output_config.format"),
        (".function.parameters", ".input_schema"),
        (".function.", "."),
    ):
        error.message = error.message.replace(ours, theirs)
        error.param = error.param and error.param.replace(ours, theirs)
    if error.param is not None and re.fullmatch(r"stop(\[\d+\])?", error.param):
        named = error.param.replace("stop", "stop_sequences")
        error.message = error.message.replace(error.param, named, 1)
        error.param = named
    return error
