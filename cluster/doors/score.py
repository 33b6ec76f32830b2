"""POST /score and /v1/score: how alike texts are, as the cosine of the angle between their embeddings."""

from typing import Any

import numpy as np

from manta.cluster.doors import fields
from manta.cluster.doors.checks import check_prompts
from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.exchange import Reply
from manta.cluster.doors.openai_call import new_head, read_fields, read_request_id
from manta.cluster.doors.pooling import MAX_INPUTS, PoolingAsk, run_pooling
from manta.cluster.doors.service import Service
from manta.cluster.engine.outputs import cosine

_ASKED = ("model", "truncate_prompt_tokens", "add_special_tokens", "priority", "cache_salt")


class Score:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, body: dict[str, Any], header_id: str, reply: Reply) -> None:
        service = self._service
        given = read_fields(service, body, fields.SCORE)
        first, second = (_texts(given, name) for name in ("text_1", "text_2"))
        if len(first) not in (1, len(second)):
            message = f"text_1 has {len(first)} texts and text_2 {len(second)}; give one text_1, or one for each text_2"
            raise RequestError(message, "text_1")
        asked = {name: given[name] for name in _ASKED if name in given}
        request_id = service.free_id("score", read_request_id(given, header_id))
        params = [*_params(given, "text_1", len(first)), *_params(given, "text_2", len(second))]
        ask = PoolingAsk([*first, *second], "text_1 and text_2 together", params, **asked)
        pooled = await run_pooling(service, ask, request_id, np.copy)
        firsts, seconds = pooled.results[: len(first)], pooled.results[len(first) :]
        if len(firsts) == 1:
            firsts = firsts * len(seconds)
        data = [
            {"object": "score", "index": index, "score": cosine(*pair)}
            for index, pair in enumerate(zip(firsts, seconds, strict=True))
        ]
        await reply.json(new_head(service, "list", request_id) | {"data": data, "usage": pooled.usage()})


def _params(given: dict[str, Any], name: str, num_texts: int) -> list[str]:
    return [name] if isinstance(given[name], str) else [f"{name}[{index}]" for index in range(num_texts)]


def _texts(given: dict[str, Any], name: str) -> list[str]:
    texts = check_prompts(given.get(name), name, MAX_INPUTS // 2)
    if not all(isinstance(text, str) for text in texts):
        raise RequestError(f"{name} must be a string or a list of strings", name, "invalid_type")
    return [str(text) for text in texts]
