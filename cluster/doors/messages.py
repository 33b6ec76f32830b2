"""POST /v1/messages and /v1/messages/count_tokens: the Anthropic Messages API over the same engine."""

import contextlib
from typing import Any

import orjson

from manta.cluster.doors.chat_format import render_chat
from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.exchange import Reply, error_headers
from manta.cluster.doors.messages_format import (
    chat_messages,
    error_body,
    read_body,
    sampling_fields,
    stop_fields,
    usage_body,
)
from manta.cluster.doors.openai_call import collect_call, started
from manta.cluster.doors.service import Service
from manta.cluster.doors.usage import Usage
from manta.cluster.doors.validate import Ask, Resolved, check_bool


class Messages:
    """One answer of the assistant, whole or as events."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, body: dict[str, Any], header_id: str, reply: Reply) -> None:
        service = self._service
        service.running.check_open()
        given = read_body(body)
        streams = check_bool(given.get("stream", False), "stream")
        text, adds_special = _prompt(service, given)
        ask = Ask(
            prompt=text,
            sampling=sampling_fields(given),
            model=given["model"],
            add_special_tokens=adds_special,
            fills_context=True,
            prompt_param="messages",
        )
        request_id = service.free_id("msg", header_id)
        resolved = await service.validator.resolve(ask, request_id)
        head = {"id": request_id, "type": "message", "role": "assistant", "model": service.config.model_name}
        if streams:
            await self._stream(head, resolved, reply)
            return
        (one,), usage = await collect_call(service, request_id, resolved)
        content = [{"type": "text", "text": one.text}] if one.text else []
        stop = stop_fields(one.finish_reason, one.stop_reason)
        await reply.json(head | {"content": content} | stop | {"usage": usage_body(usage.counts())})

    async def _stream(self, head: dict[str, Any], resolved: Resolved, reply: Reply) -> None:
        usage = Usage(resolved)
        begin = head | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage_body(usage.counts())}
        block = {"index": 0, "content_block": {"type": "text", "text": ""}}
        opening = _event("message_start", {"message": begin}) + _event("content_block_start", block)
        with self._service.running.call(head["id"], resolved) as call:
            async with contextlib.aclosing(started(call.deltas(), reply)) as deltas:
                async for index, delta in deltas:
                    usage.add(index, delta)
                    data, opening = opening, b""
                    if delta.text:
                        text = {"index": 0, "delta": {"type": "text_delta", "text": delta.text}}
                        data += _event("content_block_delta", text)
                    if delta.finish_reason is not None:
                        stop = stop_fields(delta.finish_reason, delta.stop_reason)
                        data += _event("content_block_stop", {"index": 0})
                        data += _event("message_delta", {"delta": stop, "usage": usage_body(usage.counts())})
                    if data:
                        await reply.events(data)
            await reply.end_events(_event("message_stop", {}), is_done_told=False)


class CountTokens:
    """How many tokens a conversation has as a prompt."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, body: dict[str, Any], header_id: str, reply: Reply) -> None:
        given = read_body(body, only_counts=True)
        text, adds_special = _prompt(self._service, given)
        token_ids = await self._service.validator.encode(text, adds_special)
        await reply.json({"input_tokens": len(token_ids)})


def _prompt(service: Service, given: dict[str, Any]) -> tuple[str, bool]:
    """The text of the conversation, and whether the tokenizer adds its special tokens. An answer that the client has
    begun, as the last message of the assistant, is continued."""
    service.validator.check_model(given["model"])
    messages, tokenizer = chat_messages(given), service.validator.tokenizer
    continues = messages[-1]["role"] == "assistant"
    return render_chat(tokenizer, messages, not continues, continues, {}), tokenizer.chat_template is None


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind} | fields))


async def tell(error: RequestError, request_id: str, reply: Reply) -> None:
    """Writes an error as this API does: the whole answer, or the last event of a stream that has begun."""
    body = error_body(error, request_id)
    if not reply.is_streaming:
        await reply.json(body, error.kind.value.http, error_headers(error))
        return
    event = _event("error", {name: body[name] for name in ("error", "request_id")})
    await reply.end_events(event, is_done_told=False)
