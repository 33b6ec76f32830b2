"""POST /v1/embeddings: of texts, of token ids, or of messages through the chat template."""

import base64
from collections.abc import Callable
from typing import Any

import orjson

from manta.cluster.doors import fields
from manta.cluster.doors.chat import chat_prompt
from manta.cluster.doors.checks import shown
from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.exchange import Reply
from manta.cluster.doors.openai_call import new_head, read_fields, read_request_id
from manta.cluster.doors.pooling import PoolingAsk, Vector, run_pooling
from manta.cluster.doors.service import Service
from manta.cluster.doors.tools.request import read_tools

_ASKED = ("model", "dimensions", "normalize", "truncate_prompt_tokens", "add_special_tokens", "priority", "cache_salt")


class Embeddings:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, body: dict[str, Any], header_id: str, reply: Reply) -> None:
        service = self._service
        given = read_fields(service, body, fields.EMBEDDING)
        form = _form(given.get("encoding_format", "float"))
        request_id = service.free_id("embd", read_request_id(given, header_id))
        pooled = await run_pooling(service, self._read(given), request_id, form)
        data = [
            {"object": "embedding", "index": index, "embedding": embedding}
            for index, embedding in enumerate(pooled.results)
        ]
        await reply.json(new_head(service, "list", request_id) | {"data": data, "usage": pooled.usage()})

    def _read(self, given: dict[str, Any]) -> PoolingAsk:
        asked = {name: given[name] for name in _ASKED if name in given}
        if "messages" not in given:
            given_only_for_chat = fields.CHAT_TEMPLATE & given.keys()
            if given_only_for_chat:
                name = min(given_only_for_chat)
                raise RequestError(f"{name} belongs to messages", name)
            return PoolingAsk(given.get("input"), **asked)
        if "input" in given:
            raise RequestError("give either input or messages, not both", "messages")
        # Nobody answers, so the prompt does not end with the cue to do so.
        as_chat = given | {"add_generation_prompt": given.get("add_generation_prompt", False)}
        text, adds_special = chat_prompt(self._service.validator.tokenizer, as_chat, read_tools(given))
        return PoolingAsk(text, "messages", **(asked | {"add_special_tokens": adds_special}))


def _form(encoding: Any) -> Callable[[Vector], Any]:
    """How the answer's JSON writes a vector."""
    if encoding == "float":
        return lambda vector: orjson.Fragment(orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY))
    if encoding == "base64":
        return lambda vector: base64.b64encode(vector.tobytes()).decode()
    name = "encoding_format"
    raise RequestError(f'{name} must be "float" or "base64", not {shown(encoding)}', name)
