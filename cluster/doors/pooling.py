"""Prompts that become vectors, behind both doors: what a client asked for becomes engine requests, and these a call."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from manta.cluster.doors.caller import current_tenant, with_callers_salt
from manta.cluster.doors.checks import INT32, Prompt, check_bool, check_int, check_prompts, check_salt
from manta.cluster.doors.errors import Kind, RequestError, from_engine
from manta.cluster.doors.service import Service
from manta.cluster.doors.validate import Validator
from manta.cluster.engine.client import Client, EngineError
from manta.cluster.engine.types import UNSAMPLED, GenerationRequest, TokenChunk
from manta.configs.pooling import Pooling, PoolingParams
from manta.configs.schema import ServeConfig

MAX_INPUTS = 2048  # in one call, as in the OpenAI API
MAX_AT_ONCE = 256  # of one call, in the engine: a large call leaves room in its queue for others

Vector = NDArray[np.float32]
T = TypeVar("T")


@dataclass(slots=True)
class PoolingAsk:
    """What a client asked for, in the words of neither door. Values are as the client sent them, unchecked."""

    inputs: Any  # a text, token ids, or a list of either
    param: str = "input"  # the field that errors about the inputs name
    params: Sequence[str] = ()  # the same, for each input; made of `param` if not given
    model: Any = None
    dimensions: Any = None
    normalize: Any = None
    truncate_prompt_tokens: Any = None
    add_special_tokens: Any = True
    priority: Any = 0
    cache_salt: Any = ""
    tenant: str = field(default_factory=current_tenant)


async def resolve_pooling(validator: Validator, ask: PoolingAsk, request_id: str) -> list[GenerationRequest]:
    """One engine request per input. Raises RequestError naming the field at fault."""
    validator.check_model(ask.model)
    pooling = _check_pooling(validator, ask)
    adds_special = check_bool(ask.add_special_tokens, "add_special_tokens")
    keep = _check_truncation(ask.truncate_prompt_tokens, validator.limits.max_model_len)
    priority = check_int(ask.priority, "priority", -INT32, INT32 - 1)
    salt = with_callers_salt(check_salt(ask.cache_salt))
    sources = check_prompts(ask.inputs, ask.param, MAX_INPUTS)
    requests: list[GenerationRequest] = []
    for index, source in enumerate(sources):
        if requests:
            await asyncio.sleep(0)  # between the inputs of a large call the streams of others go on
        param = ask.param if len(sources) == 1 else f"{ask.param}[{index}]"
        param = ask.params[index] if ask.params else param
        token_ids = await _encode(validator, source, param, keep, adds_special)
        name = request_id if len(sources) == 1 else f"{request_id}-{index}"
        requests.append(GenerationRequest(name, token_ids, UNSAMPLED, priority, ask.tenant, salt, pooling=pooling))
    return requests


def _check_pooling(validator: Validator, ask: PoolingAsk) -> Pooling:
    hidden_size = validator.limits.pooling.hidden_size
    dimensions, normalize = ask.dimensions, ask.normalize
    if dimensions is not None:
        check_int(dimensions, "dimensions", 1, hidden_size)
    if normalize is not None:
        check_bool(normalize, "normalize")
    return validator.limits.pooling.resolve(PoolingParams(dimensions=dimensions, normalize=normalize))


def _check_truncation(keep: Any, max_model_len: int) -> int | None:
    if keep is None:
        return None
    name = "truncate_prompt_tokens"
    if type(keep) is not int or (keep != -1 and not 1 <= keep <= max_model_len):
        code = "invalid_type" if type(keep) is not int else "invalid_value"
        raise RequestError(f"{name} must be -1 (what fits) or 1 to {max_model_len}, not {keep!r}", name, code)
    return max_model_len if keep == -1 else keep


async def _encode(validator: Validator, source: Prompt, param: str, keep: int | None, adds_special: bool) -> list[int]:
    """The first `keep` tokens, those that the tokenizer adds included."""
    limit = validator.limits.max_model_len
    if isinstance(source, str):
        validator.check_characters(source, keep, param)
        token_ids = await validator.encode(source, adds_special, keep)
    else:
        token_ids = validator.check_tokens(source, param)[:keep]
    if not token_ids:
        raise RequestError(f"{param} must not be empty", param)
    if len(token_ids) > limit:
        raise RequestError(
            f"This model's maximum context length is {limit} tokens. However, {param} has {len(token_ids)} tokens. "
            f"Please shorten it or set truncate_prompt_tokens.",
            param,
            "context_length_exceeded",
        )
    return token_ids


class PoolingCall(Generic[T]):
    """One call of a client. `form` makes of each vector what the answer needs, as they come. `num_at_once`: of the
    requests, in the engine."""

    def __init__(
        self, client: Client, requests: list[GenerationRequest], form: Callable[[Vector], T], num_at_once: int
    ) -> None:
        self.tenant = current_tenant()
        self.num_cached_tokens = 0
        self._client = client
        self._requests = requests
        self._form = form
        self._num_at_once = num_at_once
        self._aborted = False
        self._tasks: list[asyncio.Task[None]] = []

    def abort(self) -> None:
        """The call fails."""
        self._aborted = True
        for task in self._tasks:
            task.cancel()

    async def run(self) -> list[T]:
        """One result per request, in order. Raises RequestError; the requests that have not ended are then aborted, as
        they are when this is cancelled."""
        results: list[T | None] = [None] * len(self._requests)
        waiting = iter(enumerate(self._requests))

        async def work() -> None:
            for index, request in waiting:
                results[index] = self._form(await self._vector_of(request))

        self._tasks = [asyncio.create_task(work()) for _ in range(min(self._num_at_once, len(self._requests)))]
        try:
            await asyncio.gather(*self._tasks)
        except asyncio.CancelledError:
            if self._aborted:
                raise _aborted() from None
            raise  # the client has gone
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        return cast(list[T], results)

    async def _vector_of(self, request: GenerationRequest) -> Vector:
        chunks = cast(AsyncGenerator[TokenChunk, None], self._client.generate(request))
        async with contextlib.aclosing(chunks):
            try:
                chunk = await anext(chunks)
            except EngineError as error:
                raise from_engine(error) from None
        if chunk.finish_reason == "abort":
            raise _aborted()
        if chunk.finish_reason != "stop":
            message = chunk.error or "the engine failed while it ran this request"
            raise RequestError(message, code="internal_error", kind=Kind.INTERNAL)
        self.num_cached_tokens += chunk.num_cached_tokens
        return np.frombuffer(chunk.vector, "<f4")


def _aborted() -> RequestError:
    return RequestError("the request was aborted", code="aborted", kind=Kind.UNAVAILABLE)


@dataclass(frozen=True, slots=True)
class Pooled(Generic[T]):
    """What a call gave: a result per input, and its tokens."""

    results: list[T]
    num_prompt_tokens: int
    num_cached_tokens: int

    def usage(self) -> dict[str, Any]:
        """The `usage` object of the OpenAI API."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "total_tokens": self.num_prompt_tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


def num_in_engine(config: ServeConfig, requests: list[GenerationRequest]) -> int:
    """How many requests of a call at a time: no more than an empty queue holds, or it might never get through."""
    most = min(MAX_AT_ONCE, config.max_num_queued_reqs)
    if config.max_num_queued_tokens is not None:
        longest = max(len(request.prompt_token_ids) for request in requests)
        most = min(most, max(1, config.max_num_queued_tokens // longest))
    return most


async def run_pooling(service: Service, ask: PoolingAsk, request_id: str, form: Callable[[Vector], T]) -> Pooled[T]:
    """From the ask to its results. Raises RequestError."""
    requests = await resolve_pooling(service.validator, ask, request_id)
    call = PoolingCall(service.client, requests, form, num_in_engine(service.config, requests))
    with service.running.track(request_id, call):
        results = await call.run()
    return Pooled(results, sum(len(request.prompt_token_ids) for request in requests), call.num_cached_tokens)
