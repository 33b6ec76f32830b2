"""`response_format` of the OpenAI API, as a constraint of the output."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from manta.cluster.doors.checks import check_bool, shown
from manta.cluster.doors.errors import RequestError
from manta.configs.structured_outputs import StructuredOutputsParams

_KNOWN = {"name", "schema", "strict", "description"}
_TYPES = ("text", "json_object", "json_schema")


def apply_response_format(given: Mapping[str, Any], sampling: dict[str, Any]) -> None:
    """Adds to `sampling` what the body's response_format asks for. Raises RequestError."""
    value = given.get("response_format")
    if value is None:
        return
    if not isinstance(value, dict):
        raise RequestError(f"response_format must be an object, not {shown(value)}", "response_format", "invalid_type")
    kind = value.get("type")
    if kind not in _TYPES:
        message = f"response_format.type must be one of {', '.join(map(repr, _TYPES))}, not {shown(kind)}"
        raise RequestError(message, "response_format.type")
    if kind == "text":
        return
    if sampling.get("structured_outputs") is not None:
        message = "response_format and structured_outputs exclude each other"
        raise RequestError(message, "response_format")
    if kind == "json_object":
        sampling["structured_outputs"] = StructuredOutputsParams(json_object=True)
    else:
        sampling["structured_outputs"] = _from_schema(value.get("json_schema"))


def _from_schema(wrapped: Any) -> StructuredOutputsParams:
    param = "response_format.json_schema"
    if not isinstance(wrapped, dict):
        raise RequestError(f"{param} must be an object with 'name' and 'schema', not {shown(wrapped)}", param)
    for name in wrapped.keys() - _KNOWN:
        message = f"unknown field '{param}.{name}'; known ones: {', '.join(sorted(_KNOWN))}"
        raise RequestError(message, f"{param}.{name}", "unknown_parameter")
    if not isinstance(wrapped.get("name"), str):
        raise RequestError(f"{param}.name must be a string, not {shown(wrapped.get('name'))}", f"{param}.name")
    if wrapped.get("strict") is not None:
        check_bool(wrapped["strict"], f"{param}.strict")
    schema = wrapped.get("schema")
    if not isinstance(schema, dict):
        raise RequestError(f"{param}.schema must be an object, not {shown(schema)}", f"{param}.schema")
    try:
        return StructuredOutputsParams.model_validate({"json": schema})
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise RequestError(message.replace("structured_outputs.json", f"{param}.schema"), f"{param}.schema")
