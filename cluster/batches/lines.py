"""Lines of a batch file as the OpenAI API has them: what one asks for, and the line that answers it."""

import reprlib
import uuid
from codecs import BOM_UTF8
from dataclasses import dataclass
from typing import Any

import orjson

from manta.cluster.nesting import deep_field, too_deep

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages")


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One request of a batch; `custom_id` is the client's."""

    custom_id: str
    url: str
    body: dict[str, Any]


class BatchLineError(ValueError):
    """The line is no request; the message is one sentence, a short one, as it is kept with the batch. `param` names the
    field at fault, `code` is a word for programs."""

    def __init__(
        self, message: str, custom_id: str | None = None, param: str | None = None, code: str = "invalid_request"
    ) -> None:
        super().__init__(message)
        self.custom_id = custom_id
        self.param = param
        self.code = code


def read_line(line: bytes, number: int, endpoint: str | None = None) -> BatchRequest:
    """The request on line `number`, counted from 1; its url must be `endpoint`, if that is given. Raises
    BatchLineError."""
    try:
        value = orjson.loads(line.removeprefix(BOM_UTF8) if number == 1 else line)  # some editors write it
    except orjson.JSONDecodeError as error:
        message = f"line {number} is not valid JSON: {error}"
        raise BatchLineError(message, code="invalid_json_line") from None
    if not isinstance(value, dict):
        message = f"line {number} must be a JSON object with custom_id, url and body"
        raise BatchLineError(message, code="invalid_json_line")
    deep = deep_field(line, value)
    if deep is not None:
        raise BatchLineError(f"line {number}: {too_deep(deep)}", None, deep, "invalid_json_line")
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise BatchLineError(f"line {number}: custom_id must be a string that is not empty", None, "custom_id")
    if value.get("method", "POST") != "POST":
        message = f'line {number}: method must be "POST", not {reprlib.repr(value["method"])}'
        raise BatchLineError(message, custom_id, "method")
    url = value.get("url")
    if url not in ENDPOINTS:
        message = f"line {number}: url must be one of {', '.join(ENDPOINTS)}, not {reprlib.repr(url)}"
        raise BatchLineError(message, custom_id, "url", "invalid_url")
    if endpoint is not None and url != endpoint:
        message = f"line {number}: url is {reprlib.repr(url)} and the batch's endpoint {endpoint!r}; they must be equal"
        raise BatchLineError(message, custom_id, "url", "url_mismatch")
    body = value.get("body")
    if not isinstance(body, dict):
        raise BatchLineError(f"line {number}: body must be an object", custom_id, "body")
    for name in ("stream", "background"):
        if body.get(name):
            message = f"line {number}: answers of a batch are whole; leave body.{name} out"
            raise BatchLineError(message, custom_id, f"body.{name}")
    return BatchRequest(custom_id, url, body)


def answer_line(request: BatchRequest, status: int, answer: bytes, request_id: str = "") -> bytes:
    """The output line of a request that got an answer, good or bad. An answer's own id goes before `request_id`."""
    try:
        body = orjson.loads(answer)
    except orjson.JSONDecodeError:
        body = answer.decode(errors="replace")
    request_id = body.get("id", request_id) if isinstance(body, dict) else request_id
    response = {"status_code": status, "request_id": request_id, "body": body}
    return _line(request.custom_id, response, None)


def error_line(custom_id: str | None, code: str, message: str) -> bytes:
    """The output line of what got no answer."""
    return _line(custom_id, None, {"code": code, "message": message})


def _line(custom_id: str | None, response: Any, error: Any) -> bytes:
    identity = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id}
    return orjson.dumps(identity | {"response": response, "error": error}, option=orjson.OPT_APPEND_NEWLINE)
