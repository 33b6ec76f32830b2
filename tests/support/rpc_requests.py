"""Bodies of HTTP as the messages of gRPC that ask for the same."""

import json
from collections.abc import Mapping
from typing import Any

import grpc

from manta.protos import inference_pb2 as pb

_SAMPLING = frozenset(field.name for field in pb.SamplingParams.DESCRIPTOR.fields)
_EARLY_STOPPING = {False: "OFF", True: "ON", "never": "NEVER"}
_JSON_CONSTRAINTS = ("json", "structural_tag")


def generate_request(body: Mapping[str, Any], **fields: Any) -> pb.GenerateRequest:
    """Of a body of /v1/completions."""
    others = {name: value for name, value in body.items() if name not in (*_SAMPLING, "prompt")}
    request = pb.GenerateRequest(sampling=sampling_message(body), **others, **fields)
    if isinstance(body["prompt"], str):
        request.text = body["prompt"]
    else:
        request.tokens.SetInParent()
        request.tokens.ids.extend(body["prompt"])
    return request


def chat_request(body: Mapping[str, Any], **fields: Any) -> pb.ChatRequest:
    """Of a body of /v1/chat/completions. `logprobs` and `top_logprobs` become the number that Generate takes."""
    body = dict(body)
    if body.pop("logprobs", False):
        fields["sampling"] = sampling_message(body | {"logprobs": body.pop("top_logprobs", 0)})
    others = {name: value for name, value in body.items() if name not in _SAMPLING}
    others["messages"] = [_message(message) for message in body["messages"]]
    if "tools" in body:
        others["tools"] = [_tool(tool) for tool in body["tools"]]
    if "tool_choice" in body:
        others["tool_choice"] = _tool_choice(body["tool_choice"])
    if "chat_template_kwargs" in body:
        others["chat_template_kwargs"] = json.dumps(body["chat_template_kwargs"])
    if "response_format" in body:
        others["response_format"] = _response_format(body["response_format"])
    return pb.ChatRequest(**({"sampling": sampling_message(body)} | others | fields))


def sampling_message(body: Mapping[str, Any]) -> pb.SamplingParams:
    fields = {name: body[name] for name in _SAMPLING & body.keys()}
    if "early_stopping" in fields:
        fields["early_stopping"] = _EARLY_STOPPING[fields["early_stopping"]]
    if "structured_outputs" in fields:
        ((kind, value),) = fields["structured_outputs"].items()
        if kind == "choice":
            value = pb.Choices(texts=value)
        elif kind in _JSON_CONSTRAINTS:
            value = json.dumps(value)
        fields["structured_outputs"] = pb.StructuredOutputs(**{kind: value})
    return pb.SamplingParams(**fields)


def error_of(error: grpc.RpcError) -> tuple[str, str | None, str]:
    """(code, the field at fault, message)"""
    return error.code().name, dict(error.trailing_metadata()).get("error-param"), error.details()


def _message(message: Mapping[str, Any]) -> pb.ChatMessage:
    fields = dict(message)
    content = fields.get("content")
    if isinstance(content, list):
        del fields["content"]
        fields["parts"] = pb.ContentParts(parts=[{"text": part["text"]} if "text" in part else {} for part in content])
    return pb.ChatMessage(**fields)


def _tool(tool: Mapping[str, Any]) -> pb.Tool:
    fields = dict(tool)
    if "function" in fields:
        function = fields["function"] = dict(fields["function"])
        if "parameters" in function:
            function["parameters"] = json.dumps(function["parameters"])
    return pb.Tool(**fields)


def _tool_choice(choice: Any) -> pb.ToolChoice:
    if isinstance(choice, str):
        return pb.ToolChoice(mode=choice.upper())
    return pb.ToolChoice(function=choice["function"]["name"])


def _response_format(wanted: Mapping[str, Any]) -> pb.ResponseFormat:
    fields = dict(wanted)
    if "json_schema" in fields:
        inner = fields["json_schema"] = dict(fields["json_schema"])
        if "schema" in inner:
            inner["schema"] = json.dumps(inner["schema"])
    return pb.ResponseFormat(**fields)
