"""The fields of a chat body that are about tools."""

from dataclasses import dataclass, field
from typing import Any

from manta.cluster.doors.checks import check_bool, shown
from manta.cluster.doors.errors import RequestError

MAX_NAME_CHARACTERS = 128
MAX_TOOLS = 1024
_CHOICES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """Tools as in the body; choice: "none", "auto", "required", or "named" with the function's name."""

    tools: list[dict[str, Any]] = field(default_factory=list)
    choice: str = "none"
    name: str = ""
    is_parallel: bool = True  # more than one call may be made

    @property
    def is_forced(self) -> bool:
        return self.choice in ("required", "named")


def read_tools(given: dict[str, Any]) -> ToolRequest:
    """Checks `tools`, `tool_choice` and `parallel_tool_calls`. Raises RequestError."""
    tools = given.get("tools", [])
    if not isinstance(tools, list):
        raise RequestError(f"tools must be a list, not {shown(tools)}", "tools", "invalid_type")
    check_num_tools(tools)
    names = [_check_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    is_parallel = check_bool(given.get("parallel_tool_calls", True), "parallel_tool_calls")
    choice = given.get("tool_choice", "auto")
    if isinstance(choice, str):
        if choice not in _CHOICES:
            message = f"tool_choice must be one of {', '.join(_CHOICES)} or name a function, not {shown(choice)}"
            raise RequestError(message, "tool_choice")
        if not tools and choice == "required":
            raise RequestError("tool_choice 'required' needs tools", "tool_choice")
        return ToolRequest(tools, choice if tools else "none", "", is_parallel)
    name = _named(choice)
    if name not in names:
        raise RequestError(f"tool_choice names the function {shown(name)}, which is not in tools", "tool_choice")
    return ToolRequest(tools, "named", name, is_parallel)


def check_num_tools(tools: list[Any]) -> None:
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools has {len(tools)} entries, more than {MAX_TOOLS}", "tools")


def _named(choice: Any) -> str:
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        message = (
            'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}, '
            f"not {shown(choice)}"
        )
        raise RequestError(message, "tool_choice", "invalid_type")
    return name


def _check_tool(tool: Any, where: str) -> str:
    """The function's name."""
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict):
        message = f'{where} must be {{"type": "function", "function": {{"name", "description", "parameters"}}}}'
        raise RequestError(message, where, "invalid_type")
    name, where = function.get("name"), f"{where}.function"
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= MAX_NAME_CHARACTERS:
        raise RequestError(f"{where}.name must be a text of 1 to {MAX_NAME_CHARACTERS} characters", f"{where}.name")
    for key, kind, word in (("description", str, "a string"), ("parameters", dict, "an object: a JSON schema")):
        if not isinstance(function.get(key, kind()), kind) and function[key] is not None:
            raise RequestError(f"{where}.{key} must be {word}", f"{where}.{key}", "invalid_type")
    return name
