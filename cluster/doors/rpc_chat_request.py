"""Chat requests of gRPC as the fields of the HTTP body, so that both doors read them in one place."""

from typing import Any

import orjson

from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.rpc_sampling import check_enum
from manta.cluster.nesting import deep_field, too_deep
from manta.protos import inference_pb2 as pb

_SWITCHES = (
    "parallel_tool_calls", "include_reasoning", "add_generation_prompt", "continue_final_message", "add_special_tokens",
)  # fmt: skip
_MODES = {pb.ToolChoice.AUTO: "auto", pb.ToolChoice.NONE: "none", pb.ToolChoice.REQUIRED: "required"}


def read_body(request: pb.ChatRequest) -> dict[str, Any]:
    """The fields that are set, but for `sampling`. Raises RequestError for texts that are no JSON and unknown enums."""
    body: dict[str, Any] = {
        "messages": [_message(message, f"messages[{i}]") for i, message in enumerate(request.messages)],
        "model": request.model,
        "priority": request.priority,
        "cache_salt": request.cache_salt,
    }
    body |= {name: getattr(request, name) for name in _SWITCHES if request.HasField(name)}
    if request.tools:
        body["tools"] = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(request.tools)]
    kind = request.tool_choice.WhichOneof("choice")
    if kind == "function":
        body["tool_choice"] = {"type": "function", "function": {"name": request.tool_choice.function}}
    elif kind == "mode":
        check_enum(request.tool_choice.mode, pb.ToolChoice.Mode, "tool_choice")
        body["tool_choice"] = _MODES[request.tool_choice.mode]
    if request.chat_template_kwargs:
        kwargs = _read_json(request.chat_template_kwargs, "chat_template_kwargs")
        body |= {} if kwargs is None else {"chat_template_kwargs": kwargs}  # null is not set, as over HTTP
    if request.HasField("response_format"):
        body["response_format"] = _response_format(request.response_format)
    return body


def _message(message: pb.ChatMessage, where: str) -> dict[str, Any]:
    body: dict[str, Any] = {"role": message.role}
    kind = message.WhichOneof("body")
    if kind == "content":
        body["content"] = message.content
    elif kind == "parts":
        body["content"] = [
            {"text": _text(part, f"{where}.parts.parts[{index}]")} for index, part in enumerate(message.parts.parts)
        ]
    if message.tool_calls:
        body["tool_calls"] = [_call(call) for call in message.tool_calls]
    for name in ("tool_call_id", "reasoning", "name"):
        if message.HasField(name):
            body[name] = getattr(message, name)
    return body


def _text(part: pb.ContentPart, where: str) -> str:
    if not part.HasField("text"):
        raise RequestError(f"{where}.text is required", f"{where}.text", "missing_required_parameter")
    return part.text


def _call(call: pb.ToolCall) -> dict[str, Any]:
    body: dict[str, Any] = {name: value for name, value in (("id", call.id), ("type", call.type)) if value}
    if call.HasField("function"):
        body["function"] = {"name": call.function.name, "arguments": call.function.arguments}
    return body


def _tool(tool: pb.Tool, where: str) -> dict[str, Any]:
    body: dict[str, Any] = {"type": tool.type or "function"}
    if tool.HasField("function"):
        function = body["function"] = {"name": tool.function.name}
        if tool.function.HasField("description"):
            function["description"] = tool.function.description
        if tool.function.HasField("parameters"):
            function["parameters"] = _read_json(tool.function.parameters, f"{where}.function.parameters")
    return body


def _response_format(wanted: pb.ResponseFormat) -> dict[str, Any]:
    body: dict[str, Any] = {"type": wanted.type}
    if wanted.HasField("json_schema"):
        body["json_schema"] = {field.name: value for field, value in wanted.json_schema.ListFields()}
        if wanted.json_schema.HasField("schema"):
            where = "response_format.json_schema.schema"
            body["json_schema"]["schema"] = _read_json(wanted.json_schema.schema, where)
    return body


def _read_json(text: str, param: str) -> Any:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"{param} is not valid JSON: {error}", param, "invalid_json")
    if deep_field(text.encode(), {param: value}):
        raise RequestError(too_deep(param), param, "invalid_json")
    return value
