"""Generate: a prompt goes on, over gRPC."""

import contextlib
from collections.abc import AsyncGenerator

from manta.cluster.doors.completions import completion_sampling, echoed_texts
from manta.cluster.doors.rpc_answer import New, read_request_id, run_call, tell_end, tell_logprobs
from manta.cluster.doors.rpc_sampling import check_enum, read_sampling
from manta.cluster.doors.service import Service
from manta.cluster.doors.usage import Usage
from manta.cluster.doors.validate import Ask, Resolved
from manta.protos import inference_pb2 as pb


async def generate(service: Service, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
    """Raises RequestError or EngineError."""
    service.running.check_open()
    request_id = read_request_id(request.request_id)
    check_enum(request.output, pb.GenerateRequest.Output, "output")
    ask = read_ask(request)
    resolved = await service.validator.resolve(ask, request_id)
    prefix = echoed_texts(service.validator.tokenizer, ask, resolved)[0] if request.echo else None
    form = _Form(request_id, resolved, request.output, prefix)
    async with contextlib.aclosing(run_call(service, request_id, resolved, request.stream)) as news:
        async for index, new, usage in news:
            response = form.response(index, new, usage)
            if response is not None:
                yield response


def read_ask(request: pb.GenerateRequest) -> Ask:
    """The request in the validator's words: sampling fields that are not set do not appear."""
    return Ask(
        prompt=_prompt(request),
        sampling=completion_sampling(read_sampling(request.sampling), request.echo),
        model=request.model,
        priority=request.priority,
        cache_salt=request.cache_salt,
        add_special_tokens=request.add_special_tokens if request.HasField("add_special_tokens") else True,
        echoes=request.echo,
    )


def _prompt(request: pb.GenerateRequest) -> str | list[int] | None:
    kind = request.WhichOneof("prompt")
    if kind is None:
        return None
    return request.text if kind == "text" else list(request.tokens.ids)


class _Form:
    """How completions are written. `prefix` is the text of a prompt that is echoed."""

    def __init__(self, request_id: str, resolved: Resolved, output: int, prefix: str | None) -> None:
        self._request_id = request_id
        self._prompt = resolved.prompts[0]
        self._tells_text = output != pb.GenerateRequest.TOKENS
        self._tells_tokens = output != pb.GenerateRequest.TEXT
        self._prefix = prefix
        self._unechoed = set() if prefix is None else set(range(len(resolved.requests)))

    def response(self, index: int, new: New, usage: Usage | None) -> pb.GenerateResponse | None:
        """None where there is nothing to tell yet."""
        text = new.text if self._tells_text else ""
        token_ids = new.token_ids if self._tells_tokens else []
        is_first = index in self._unechoed
        if is_first and self._tells_text and self._prefix:
            text = self._prefix + text
        has_logprobs = new.prompt_logprobs is not None or (new.token_ids and new.logprobs is not None)
        if new.finish_reason is None and not (text or token_ids or has_logprobs):
            return None
        response = pb.GenerateResponse(request_id=self._request_id, index=index, text=text, token_ids=token_ids)
        if is_first:
            self._unechoed.discard(index)
            if self._tells_tokens:
                response.prompt_token_ids.extend(self._prompt)
        tell_logprobs(response, self._prompt, new)
        tell_end(response, new.finish_reason, new, usage)
        return response
