"""Chat: messages are answered, over gRPC."""

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from manta.cluster.doors.answer import AnswerPlan, message_body
from manta.cluster.doors.chat import read_chat
from manta.cluster.doors.openai_call import Completed
from manta.cluster.doors.response_format import apply_response_format
from manta.cluster.doors.rpc_answer import New, read_request_id, run_call, tell_end, tell_logprobs
from manta.cluster.doors.rpc_chat_request import read_body
from manta.cluster.doors.rpc_sampling import read_sampling
from manta.cluster.doors.service import Service
from manta.cluster.doors.tools.events import Arguments, Call, Content, Event, Reasoning
from manta.cluster.doors.usage import Usage
from manta.cluster.doors.validate import Resolved
from manta.protos import inference_pb2 as pb


async def chat(service: Service, request: pb.ChatRequest) -> AsyncGenerator[pb.ChatResponse, None]:
    """Raises RequestError or EngineError."""
    service.running.check_open()
    request_id = read_request_id(request.request_id)
    service.validator.check_model(request.model)
    body, sampling = read_body(request), read_sampling(request.sampling)
    apply_response_format(body, sampling)
    ask, plan = read_chat(service, body, sampling)
    resolved = await service.validator.resolve(ask, request_id)
    form = _Form(request_id, resolved, plan, request.return_token_ids)
    async with contextlib.aclosing(run_call(service, request_id, resolved, request.stream)) as news:
        async for index, new, usage in news:
            for response in form.responses(index, new, usage):
                yield response


class _Form:
    """How answers are written: one response for each thing that is new, so that their order is told."""

    def __init__(self, request_id: str, resolved: Resolved, plan: AnswerPlan, tells_token_ids: bool) -> None:
        self._request_id = request_id
        self._prompt = resolved.prompts[0]
        self._tells_token_ids = tells_token_ids
        self._readers = [plan.new_reader() for _ in resolved.requests]
        self._new = set(range(len(resolved.requests)))

    def responses(self, index: int, new: New, usage: Usage | None) -> list[pb.ChatResponse]:
        reader, is_last = self._readers[index], new.finish_reason is not None
        events = reader.push(new.text, is_last)
        if isinstance(new, Completed):
            responses = [_whole(message_body(events))]
        else:
            responses = [response for event in events if (response := _piece(event)) is not None]
        has_tokens = bool(new.token_ids) and (self._tells_token_ids or new.logprobs is not None)
        if not responses and (is_last or has_tokens or new.prompt_logprobs is not None):
            responses = [pb.ChatResponse()]
        if not responses:
            return []
        self._tell_tokens(responses[0], index, new)
        for response in responses:
            response.request_id, response.index = self._request_id, index
        tell_end(responses[-1], reader.finish_reason(new.finish_reason), new, usage)
        return responses

    def _tell_tokens(self, response: pb.ChatResponse, index: int, new: New) -> None:
        if self._tells_token_ids:
            response.token_ids.extend(new.token_ids)
            if index in self._new:
                response.prompt_token_ids.extend(self._prompt)
        self._new.discard(index)
        tell_logprobs(response, self._prompt, new)


def _piece(event: Event) -> pb.ChatResponse | None:
    """What tells of one event; None for what cannot be told any more."""
    match event:
        case Content(text):
            return pb.ChatResponse(content=text)
        case Reasoning(text):
            return pb.ChatResponse(reasoning=text)
        case Call(index, call_id, name):
            return pb.ChatResponse(tool_calls=[pb.ToolCallDelta(index=index, id=call_id, name=name)])
        case Arguments(index, text):
            return pb.ChatResponse(tool_calls=[pb.ToolCallDelta(index=index, arguments=text)])
    return None


def _whole(message: dict[str, Any]) -> pb.ChatResponse:
    calls = [
        pb.ToolCallDelta(index=index, id=call["id"], **call["function"])
        for index, call in enumerate(message.get("tool_calls", ()))
    ]
    return pb.ChatResponse(content=message["content"] or "", reasoning=message.get("reasoning", ""), tool_calls=calls)
