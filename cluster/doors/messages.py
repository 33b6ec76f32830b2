"""POST /v1/messages and /v1/messages/count_tokens: the Anthropic Messages API over the same calls as chat."""

import contextlib
from dataclasses import dataclass
from typing import Any

from manta.cluster.doors.answer import AnswerPlan
from manta.cluster.doors.chat import read_long_chat
from manta.cluster.doors.checks import check_bool
from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.exchange import Reply, error_headers
from manta.cluster.doors.messages_blocks import chat_messages
from manta.cluster.doors.messages_fields import (
    Thinking,
    apply_output_format,
    read_thinking,
    retold,
    template_arguments,
    tool_fields,
)
from manta.cluster.doors.messages_format import error_body, read_body, sampling_fields, stop_fields, usage_body
from manta.cluster.doors.messages_output import ContentBlocks, event_bytes
from manta.cluster.doors.openai_call import started
from manta.cluster.doors.output import Delta
from manta.cluster.doors.responses.reading import AnswerReading
from manta.cluster.doors.service import Service
from manta.cluster.doors.usage import Usage
from manta.cluster.doors.validate import Ask, Resolved


@dataclass(frozen=True, slots=True)
class _Asked:
    ask: Ask
    plan: AnswerPlan
    thinking: Thinking


class Messages:
    """One answer of the assistant, whole or as events."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, body: dict[str, Any], header_id: str, reply: Reply) -> None:
        service = self._service
        service.running.check_open()
        given = read_body(body)
        streams = check_bool(given.get("stream", False), "stream")
        request_id = service.free_id("msg", header_id)
        try:
            asked = await _read(service, given)
            resolved = await service.validator.resolve(asked.ask, request_id)
        except RequestError as error:
            raise retold(error)
        head = {"id": request_id, "type": "message", "role": "assistant", "model": service.config.model_name}
        answer = _Answer(service, asked, resolved, streams=streams)
        if streams:
            await self._stream(head, resolved, answer, reply)
            return
        with service.running.call(request_id, resolved) as call:
            async with contextlib.aclosing(call.deltas()) as deltas:
                async for _, delta in deltas:
                    answer.push(delta)
        await reply.json(head | {"content": answer.blocks.end()} | answer.stop | {"usage": answer.usage()})

    async def _stream(self, head: dict[str, Any], resolved: Resolved, answer: "_Answer", reply: Reply) -> None:
        begin = head | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": answer.usage()}
        opening = event_bytes("message_start", {"message": begin})
        with self._service.running.call(head["id"], resolved) as call:
            async with contextlib.aclosing(started(call.deltas(), reply, opening)) as deltas:
                async for _, delta in deltas:
                    answer.push(delta)
                    data = answer.blocks.take_events()
                    if data:
                        await reply.events(data)
            answer.blocks.end()
            data = answer.blocks.take_events()
            data += event_bytes("message_delta", {"delta": answer.stop, "usage": answer.usage()})
            await reply.end_events(data + event_bytes("message_stop", {}), is_done_told=False)


class _Answer:
    """The answer as it grows."""

    def __init__(self, service: Service, asked: _Asked, resolved: Resolved, *, streams: bool) -> None:
        self.blocks = ContentBlocks(streams=streams, shows_thinking=asked.thinking.is_shown)
        self.stop: dict[str, Any] = {}
        self._usage = Usage(resolved)
        self._reading = AnswerReading(asked.plan, resolved, service.validator.tokenizer, self.blocks)

    def push(self, delta: Delta) -> None:
        self._usage.add(0, delta)
        self._reading.push(delta)
        if delta.finish_reason is not None:
            self.stop = stop_fields(delta.finish_reason, delta.stop_reason, self.blocks.num_calls > 0)

    def usage(self) -> dict[str, Any]:
        details = {"thinking_tokens": self._reading.num_reasoning_tokens()}
        return usage_body(self._usage.counts()) | {"output_tokens_details": details}


class CountTokens:
    """How many tokens a conversation has as a prompt."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, body: dict[str, Any], header_id: str, reply: Reply) -> None:
        given = read_body(body, only_counts=True)
        try:
            ask = (await _read(self._service, given)).ask
        except RequestError as error:
            raise retold(error)
        token_ids = await self._service.validator.encode(ask.prompt, ask.add_special_tokens)
        await reply.json({"input_tokens": len(token_ids)})


async def _read(service: Service, given: dict[str, Any]) -> _Asked:
    """What a checked body asks for. An answer that the client has begun, as the last message of the assistant, is
    continued. Raises RequestError, which may speak of fields of a chat call."""
    service.validator.check_model(given["model"])
    messages = chat_messages(given)
    thinking = read_thinking(given, service.config)
    continues = messages[-1]["role"] == "assistant"
    chat = tool_fields(given) | {
        "model": given["model"],
        "messages": messages,
        "continue_final_message": continues,
        "add_generation_prompt": not continues,
        "chat_template_kwargs": template_arguments(given, thinking, service.validator.tokenizer),
        "include_reasoning": thinking.is_on,
    }
    sampling = sampling_fields(given)
    apply_output_format(given, sampling)
    ask, plan = await read_long_chat(service, chat, sampling)
    return _Asked(ask, plan, thinking)


async def tell(error: RequestError, request_id: str, reply: Reply) -> None:
    """Writes an error as this API does: the whole answer, or the last event of a stream that has begun."""
    body = error_body(error, request_id)
    if not reply.is_streaming:
        await reply.json(body, error.kind.value.http, error_headers(error))
        return
    event = event_bytes("error", {name: body[name] for name in ("error", "request_id")})
    await reply.end_events(event, is_done_told=False)
