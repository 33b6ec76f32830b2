"""The gRPC door: manta.inference.v1 over the same validator and the same calls as HTTP."""

import contextlib
import functools
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NoReturn, TypeVar

from manta.cluster.doors.errors import RequestError, from_engine, internal
from manta.cluster.doors.exchange import is_request_id
from manta.cluster.doors.generation import IndexedDelta
from manta.cluster.doors.output import Delta
from manta.cluster.doors.rpc_writer import RpcWriter, SlowReaderError, end_slow_call
from manta.cluster.doors.service import Service
from manta.cluster.doors.state import answer_in_time, manta_version
from manta.cluster.doors.usage import Usage
from manta.cluster.doors.validate import Ask
from manta.cluster.engine.client import EngineError
from manta.cluster.engine.logprobs import Records, no_records
from manta.protos import inference_pb2 as pb
from manta.protos import inference_pb2_grpc as pb_grpc

logger = logging.getLogger("manta.doors")
Context = Any  # grpc.aio.ServicerContext, which is generic in a way that says nothing here
Answer = TypeVar("Answer")


async def _fail(context: Context, error: RequestError | EngineError) -> NoReturn:
    if isinstance(error, EngineError):
        error = from_engine(error)
    details = {"error-param": error.param, "error-code": error.code}
    metadata = [(key, value) for key, value in details.items() if value]
    if error.retry_after_s is not None:
        metadata.append(("retry-after", str(max(1, round(error.retry_after_s)))))
    await context.abort(error.kind.value.grpc, error.message, tuple(metadata))
    raise AssertionError("abort raises")


def _answered(
    method: Callable[["InferenceServicer", Any], Awaitable[Answer]],
) -> Callable[["InferenceServicer", Any, Context], Awaitable[Answer]]:
    """Turns the errors of a unary call into its status."""

    @functools.wraps(method)
    async def answered(self: "InferenceServicer", request: Any, context: Context) -> Answer:
        try:
            return await method(self, request)
        except (RequestError, EngineError) as error:
            await _fail(context, error)
        except Exception as error:
            logger.exception("%s failed", method.__name__)
            await _fail(context, internal(error))

    return answered


class InferenceServicer(pb_grpc.InferenceServicer):
    """Errors are status codes; the trailing metadata names the field (`error-param`) and the `error-code`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        try:
            async with contextlib.aclosing(_generate(self._service, request)) as responses:
                with RpcWriter(context) as writer:
                    async for response in responses:
                        await writer.write(response)
        except SlowReaderError:
            await end_slow_call(context)
        except (RequestError, EngineError) as error:
            await _fail(context, error)
        except Exception as error:
            logger.exception("Generate failed")
            await _fail(context, internal(error))

    @_answered
    async def Tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        validator = self._service.validator
        adds_special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        token_ids = await validator.encode(request.text, adds_special)
        return pb.TokenizeResponse(ids=token_ids, max_model_len=validator.limits.max_model_len)

    @_answered
    async def Detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        validator = self._service.validator
        token_ids = validator.check_tokens(list(request.ids), "ids")
        return pb.DetokenizeResponse(text=validator.tokenizer.decode(token_ids))

    @_answered
    async def Abort(self, request: pb.AbortRequest) -> pb.AbortResponse:
        return pb.AbortResponse(found=self._service.running.abort(request.request_id))

    @_answered
    async def GetModelInfo(self, request: pb.GetModelInfoRequest) -> pb.GetModelInfoResponse:
        info = await answer_in_time(self._service.client.info())
        config, limits = self._service.config, self._service.validator.limits
        return pb.GetModelInfoResponse(
            model=limits.model_name,
            path=config.model,
            architecture=limits.architecture,
            max_model_len=limits.max_model_len,
            vocab_size=limits.vocab_size,
            tensor_parallel_size=config.tensor_parallel_size,
            pipeline_parallel_size=config.pipeline_parallel_size,
            data_parallel_size=config.data_parallel_size,
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            version=manta_version(),
        )

    @_answered
    async def GetLoad(self, request: pb.GetLoadRequest) -> pb.GetLoadResponse:
        load = await answer_in_time(self._service.client.load())
        return pb.GetLoadResponse(
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_free_blocks=load.num_free_blocks,
            num_blocks=load.num_blocks,
            kv_cache_usage=load.kv_cache_usage,
        )


async def _generate(service: Service, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
    service.running.check_open()
    request_id = request.request_id or uuid.uuid4().hex
    if not is_request_id(request_id):
        message = "request_id must be up to 128 printable ASCII characters without spaces"
        raise RequestError(message, "request_id")
    if request.output not in pb.GenerateRequest.Output.values():
        raise RequestError(f"output {request.output} is not one of the Output values", "output")
    resolved = await service.validator.resolve(read_ask(request), request_id)
    usage = Usage(resolved)
    with service.running.call(request_id, resolved) as call:
        async with contextlib.aclosing(call.deltas()) as deltas:
            steps = deltas if request.stream else _joined(deltas)
            async for _, delta in steps:
                usage.add(0, delta)
                response = _response(request_id, resolved.prompts[0], delta, request.output, usage)
                if response is not None:
                    yield response


def read_ask(request: pb.GenerateRequest) -> Ask:
    """The request in the validator's words: sampling fields that are not set do not appear."""
    given = {descriptor.name: value for descriptor, value in request.sampling.ListFields()}
    constraint = given.pop("structured_outputs", None)
    sampling = {name: _plain(value) for name, value in given.items()}
    if constraint is not None:
        sampling["structured_outputs"] = _constraint(constraint)
    return Ask(
        prompt=_prompt(request),
        sampling=sampling,
        model=request.model,
        priority=request.priority,
        cache_salt=request.cache_salt,
        add_special_tokens=request.add_special_tokens if request.HasField("add_special_tokens") else True,
    )


def _plain(value: Any) -> Any:
    """Repeated fields and maps are containers of protobuf's own."""
    if isinstance(value, int | float):
        return value
    return dict(value) if hasattr(value, "items") else list(value)


def _constraint(value: pb.StructuredOutputs) -> dict[str, Any]:
    name = value.WhichOneof("constraint")
    if name is None:
        return {}
    return {name: list(value.choice.texts) if name == "choice" else getattr(value, name)}


def _prompt(request: pb.GenerateRequest) -> str | list[int] | None:
    kind = request.WhichOneof("prompt")
    if kind is None:
        return None
    return request.text if kind == "text" else list(request.tokens.ids)


async def _joined(deltas: AsyncIterator[IndexedDelta]) -> AsyncIterator[IndexedDelta]:
    """All deltas of one completion as a single one."""
    texts: list[str] = []
    whole = Delta("", [])
    async for index, delta in deltas:
        texts.append(delta.text)
        whole.token_ids += delta.token_ids
        whole.num_cached_tokens = max(whole.num_cached_tokens, delta.num_cached_tokens)
        if delta.logprobs is not None:
            whole.logprobs = whole.logprobs or no_records()
            whole.logprobs.extend(delta.logprobs)
        if delta.prompt_logprobs is not None:
            whole.prompt_logprobs = delta.prompt_logprobs
        if delta.finish_reason is not None:
            whole.text, whole.finish_reason, whole.stop_reason = "".join(texts), delta.finish_reason, delta.stop_reason
            yield index, whole


def _logprobs(token_ids: Sequence[int], records: Records) -> list[pb.TokenLogprobs]:
    return [
        pb.TokenLogprobs(token_id=token, logprob=chosen, rank=rank, top_ids=ids, top_logprobs=best)
        for token, chosen, rank, ids, best in zip(
            token_ids, records.chosen, records.ranks, records.best_ids, records.best, strict=True
        )
    ]


def _response(
    request_id: str, prompt: list[int], delta: Delta, output: int, usage: Usage
) -> pb.GenerateResponse | None:
    text = "" if output == pb.GenerateRequest.TOKENS else delta.text
    token_ids = [] if output == pb.GenerateRequest.TEXT else delta.token_ids
    tells_tokens = delta.token_ids and delta.logprobs is not None
    if delta.finish_reason is None and not (text or token_ids or tells_tokens):
        return None
    response = pb.GenerateResponse(request_id=request_id, text=text, token_ids=token_ids)
    if delta.logprobs is not None:
        response.logprobs.extend(_logprobs(delta.token_ids, delta.logprobs))
    if delta.prompt_logprobs is not None:
        response.prompt_logprobs.extend(_logprobs(prompt[1:], delta.prompt_logprobs))
    if delta.finish_reason is None:
        return response
    response.finish_reason = delta.finish_reason
    response.usage.CopyFrom(pb.Usage(**usage.counts()))
    if isinstance(delta.stop_reason, str):
        response.stop_string = delta.stop_reason
    elif delta.stop_reason is not None:
        response.stop_token_id = delta.stop_reason
    return response
