"""Lines of a batch file as the OpenAI API has them: what one asks for, and the line that answers it."""

import uuid
from dataclasses import dataclass
from typing import Any

import orjson

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/messages")


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One request of a batch; `custom_id` is the client's."""

    custom_id: str
    url: str
    body: dict[str, Any]


class BatchLineError(ValueError):
    """The line is no request; the message is one sentence."""

    def __init__(self, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.custom_id = custom_id


def read_line(line: bytes, number: int) -> BatchRequest:
    """The request on line `number`, counted from 1. Raises BatchLineError."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BatchLineError(f"line {number} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BatchLineError(f"line {number} must be a JSON object with custom_id, url and body")
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise BatchLineError(f"line {number}: custom_id must be a string that is not empty")
    if value.get("method", "POST") != "POST":
        raise BatchLineError(f'line {number}: method must be "POST", not {value["method"]!r}', custom_id)
    if value.get("url") not in ENDPOINTS:
        raise BatchLineError(
            f"line {number}: url must be one of {', '.join(ENDPOINTS)}, not {value.get('url')!r}", custom_id
        )
    body = value.get("body")
    if not isinstance(body, dict):
        raise BatchLineError(f"line {number}: body must be an object", custom_id)
    if body.get("stream"):
        raise BatchLineError(f"line {number}: answers of a batch are whole; leave body.stream out", custom_id)
    return BatchRequest(custom_id, value["url"], body)


def answer_line(request: BatchRequest, status: int, answer: bytes) -> bytes:
    """The output line of a request that got an answer, good or bad."""
    try:
        body = orjson.loads(answer)
    except orjson.JSONDecodeError:
        body = answer.decode(errors="replace")
    request_id = body.get("id", "") if isinstance(body, dict) else ""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return _line(request.custom_id, response, None)


def error_line(custom_id: str | None, code: str, message: str) -> bytes:
    """The output line of what got no answer."""
    return _line(custom_id, None, {"code": code, "message": message})


def _line(custom_id: str | None, response: Any, error: Any) -> bytes:
    identity = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id}
    return orjson.dumps(identity | {"response": response, "error": error}, option=orjson.OPT_APPEND_NEWLINE)
