"""Input files of batches, and what comes back."""

import json
import time
from typing import Any

import openai
from openai.types import Batch

ENDED = {"completed", "failed", "cancelled", "expired"}


def line(custom_id: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def jsonl(lines: list[Any]) -> bytes:
    """Bytes are written as they are."""
    return b"".join(each if isinstance(each, bytes) else json.dumps(each).encode() + b"\n" for each in lines)


def create(client: openai.OpenAI, lines: list[Any], **fields: Any) -> Batch:
    """Uploads the lines and makes a batch of them."""
    file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    given: dict[str, Any] = {"endpoint": "/v1/completions", "completion_window": "24h"} | fields
    return client.batches.create(input_file_id=file.id, **given)


def wait(client: openai.OpenAI, batch: Batch, *states: str, timeout_s: float = 30.0) -> Batch:
    """Until it is in one of the states; those of its end if none is given."""
    deadline_s = time.monotonic() + timeout_s
    while batch.status not in (states or ENDED):
        assert time.monotonic() < deadline_s, batch
        assert batch.status not in ENDED, batch
        time.sleep(0.01)
        batch = client.batches.retrieve(batch.id)
    return batch


def read(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    """The lines of a file of output by custom_id; none may be there twice."""
    if file_id is None:
        return {}
    lines = [json.loads(each) for each in client.files.content(file_id).text.splitlines()]
    found = {each["custom_id"]: each for each in lines}
    assert len(found) == len(lines)
    return found
