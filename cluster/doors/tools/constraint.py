"""What a forced tool_choice asks of the answer, as a JSON schema."""

from typing import Any

from manta.cluster.doors.tools.request import ToolRequest

_DEFINITIONS = ("$defs", "definitions")


def tool_schema(request: ToolRequest) -> dict[str, Any]:
    """The schema that an answer to a forced choice follows: the arguments of the named function, or for "required" an
    array of {"name", "parameters"}. Definitions of the tools' schemas move to the top, where references look for them.
    """
    functions = [tool["function"] for tool in request.tools]
    if request.choice == "named":
        return next(_parameters(function) for function in functions if function["name"] == request.name)
    definitions: dict[str, dict[str, Any]] = {}
    calls = []
    for function in functions:
        parameters = dict(_parameters(function))
        for key in _DEFINITIONS:
            if isinstance(parameters.get(key), dict):
                definitions.setdefault(key, {}).update(parameters.pop(key))
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"type": "string", "enum": [function["name"]]}, "parameters": parameters},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not request.is_parallel:
        schema["maxItems"] = 1
    return schema | definitions


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments; one without parameters takes no arguments."""
    parameters: dict[str, Any] | None = function.get("parameters")
    if not parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object"} | parameters
