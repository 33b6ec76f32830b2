"""What a forced tool_choice asks of the answer, as a JSON schema."""

from typing import Any

from pydantic import ValidationError

from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.tools.request import ToolRequest
from manta.configs.structured_outputs import StructuredOutputsParams

_WHOLE = frozenset({"$ref", "anyOf", "oneOf", "allOf", "const", "enum"})  # beside them a type says nothing


def force_calls(request: ToolRequest, sampling: dict[str, Any]) -> None:
    """Adds to `sampling` what a forced choice asks for. Raises RequestError where that is not possible."""
    if not request.is_forced:
        return
    if sampling.get("structured_outputs") is not None:
        message = "a tool_choice that forces a call excludes response_format and structured_outputs"
        raise RequestError(message, "tool_choice")
    try:
        sampling["structured_outputs"] = StructuredOutputsParams.model_validate({"json": tool_schema(request)})
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise RequestError(f"tool_choice cannot be forced with these tools: {reason}", "tools")
    except RecursionError:
        raise RequestError("tool_choice cannot be forced with these tools: they nest too deep", "tools")


def tool_schema(request: ToolRequest) -> dict[str, Any]:
    """The schema that an answer to a forced choice follows: the arguments of the named function, or for "required" an
    array of {"name", "parameters"}."""
    functions = [tool["function"] for tool in request.tools]
    if request.choice == "named":
        return next(_parameters(function) for function in functions if function["name"] == request.name)
    definitions, calls = {}, []
    for index, function in enumerate(functions):
        place = f"#/$defs/tool_{index}"
        definitions[f"tool_{index}"] = _moved(_parameters(function), place)
        properties = {"name": {"type": "string", "enum": [function["name"]]}, "parameters": {"$ref": place}}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": definitions}
    if not request.is_parallel:
        schema["maxItems"] = 1
    return schema


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments; one without parameters takes no arguments."""
    parameters: dict[str, Any] | None = function.get("parameters")
    if not parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return parameters if _WHOLE & parameters.keys() else {"type": "object"} | parameters


def _moved(part: Any, place: str) -> Any:
    """A schema that no longer is the root, but at `place`: references within it follow."""
    if isinstance(part, list):
        return [_moved(each, place) for each in part]
    if not isinstance(part, dict):
        return part
    return {
        key: place + value[1:]
        if key == "$ref" and isinstance(value, str) and value[:1] == "#"
        else _moved(value, place)
        for key, value in part.items()
    }
