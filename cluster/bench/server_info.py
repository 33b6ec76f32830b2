"""What the server says of its model."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import orjson

from manta.cluster.bench.answers import error_message
from manta.cluster.bench.errors import BenchError
from manta.cluster.bench.http_client import AnswerError, HttpClient

_RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class ServerModel:
    """A model as /v1/models lists it; None where the server does not say."""

    name: str
    root: str | None
    max_model_len: int | None


class _Collected:
    """Receiver of a plain answer."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""

    def on_start(self, status: int) -> None:
        self.status = status

    def on_body(self, piece: bytes, now_s: float) -> None:
        self.body += piece


async def find_model(client: HttpClient, where: str, name: str | None, timeout_s: float) -> ServerModel:
    """The model called `name`, or the first one listed. Tries for `timeout_s` to reach the server.

    A server without /v1/models needs a name. Raises BenchError.
    """
    answer = await _get(client, "/v1/models", where, timeout_s)
    listed = _listed_models(answer) if answer.status == 200 else None
    if name is not None:
        found = next((model for model in listed or [] if model.get("id") == name), {})
    elif listed:
        found = listed[0]
    else:
        said = "an empty list" if listed == [] else f"{answer.status}: {error_message(answer.body)}"
        raise BenchError(f"{where}/v1/models answered {said}; name the model with --model")
    length = found.get("max_model_len")
    root = found.get("root")
    return ServerModel(
        name or str(found["id"]), root if isinstance(root, str) else None, length if isinstance(length, int) else None
    )


async def _get(client: HttpClient, path: str, where: str, timeout_s: float) -> _Collected:
    deadline_s = time.perf_counter() + timeout_s
    while True:
        answer = _Collected()
        try:
            await client.request("GET", path, b"", answer)
        except AnswerError as error:
            if time.perf_counter() >= deadline_s:
                raise BenchError(f"no answer from {where}: {error}") from None
        else:
            if answer.status != 503 or time.perf_counter() >= deadline_s:  # 503: it is still starting
                return answer
        await asyncio.sleep(_RETRY_S)


def _listed_models(answer: _Collected) -> list[dict[str, Any]] | None:
    try:
        models = orjson.loads(answer.body)["data"]
    except (ValueError, KeyError, TypeError):
        return None
    return (
        [model for model in models if isinstance(model, dict) and "id" in model] if isinstance(models, list) else None
    )
