"""`tools`, `tool_choice` and `parallel_tool_calls` of a response, as a chat call has them."""

from typing import Any

from manta.cluster.doors.checks import shown
from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.tools.request import check_num_tools, read_tools

_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")
_CHOICES = ("none", "auto", "required")


def chat_tools(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of a chat body, checked, and what the answer tells again. Raises RequestError."""
    tools = given.get("tools", [])
    if not isinstance(tools, list):
        raise RequestError(f"tools must be a list, not {shown(tools)}", "tools", "invalid_type")
    check_num_tools(tools)
    functions = [_function(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    choice = given.get("tool_choice", "auto")
    chat: dict[str, Any] = {"tools": functions}
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        chat["tools"], chat["tool_choice"] = _allowed(choice, functions)
    elif isinstance(choice, dict) and choice.get("type") == "function":
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    elif isinstance(choice, str) or choice is None:
        chat["tool_choice"] = choice
    else:
        kind = choice.get("type") if isinstance(choice, dict) else choice
        message = (
            f'tool_choice must be "none", "auto", "required", {{"type": "function", "name": ...}} or allowed_tools, '
            f"not {shown(kind)}; hosted tools are not supported"
        )
        raise RequestError(message, "tool_choice", "unsupported_parameter")
    if "parallel_tool_calls" in given:
        chat["parallel_tool_calls"] = given["parallel_tool_calls"]
    try:
        read_tools(chat)
    except RequestError as error:  # it knows functions one level deeper
        error.message = error.message.replace(".function.", ".")
        error.param = error.param and error.param.replace(".function.", ".")
        raise
    told = [
        {name: tool["function"].get(name) for name in _FUNCTION_FIELDS} | {"type": "function"} for tool in functions
    ]
    return chat, {"tools": told, "tool_choice": choice}


def _function(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        message = f'{where} must be {{"type": "function", "name", "description", "parameters"}}, not {shown(tool)}'
        raise RequestError(message, where, "invalid_type")
    kind = tool.get("type")
    if kind != "function":
        message = (
            f'{where} has type {shown(kind)}, which is not supported: this server runs no tools, it takes "function"'
        )
        raise RequestError(message, f"{where}.type", "unsupported_parameter")
    if "function" in tool:
        message = f"{where}: name, description and parameters stand beside type here, not in 'function' as in chat"
        raise RequestError(message, f"{where}.function", "unknown_parameter")
    return {
        "type": "function",
        "function": {name: tool[name] for name in _FUNCTION_FIELDS if tool.get(name) is not None},
    }


def _allowed(choice: dict[str, Any], functions: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The functions that may be called are those that the model is told of."""
    mode, listed = choice.get("mode"), choice.get("tools")
    if mode not in ("auto", "required") or not isinstance(listed, list) or not listed:
        message = 'tool_choice of type allowed_tools has mode "auto" or "required", and a list of tools'
        raise RequestError(message, "tool_choice")
    by_name = {function["function"].get("name"): function for function in functions}
    for tool in listed:
        name = tool.get("name") if isinstance(tool, dict) else tool
        if not isinstance(name, str) or name not in by_name:
            raise RequestError(f"tool_choice allows {shown(name)}, which is not in tools", "tool_choice")
    return [by_name[tool["name"]] for tool in listed], mode
