"""What Generate and Chat have in common: ids, running a call to its answers, and the parts that both messages have."""

import contextlib
import uuid
from collections.abc import AsyncGenerator, Sequence

from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.exchange import is_request_id
from manta.cluster.doors.openai_call import Completed, collect_call
from manta.cluster.doors.output import Delta
from manta.cluster.doors.service import Service
from manta.cluster.doors.usage import Usage
from manta.cluster.doors.validate import Resolved
from manta.cluster.engine.logprobs import Records
from manta.protos import inference_pb2 as pb

New = Completed | Delta  # of one completion: all of it, or what is new
Response = pb.GenerateResponse | pb.ChatResponse


def read_request_id(wanted: str) -> str:
    """The client's, or a new one. Raises RequestError."""
    request_id = wanted or uuid.uuid4().hex
    if not is_request_id(request_id):
        message = "request_id must be up to 128 printable ASCII characters without spaces"
        raise RequestError(message, "request_id")
    return request_id


async def run_call(
    service: Service, request_id: str, resolved: Resolved, streams: bool
) -> AsyncGenerator[tuple[int, New, Usage | None], None]:
    """(number of the completion, what is new of it, the usage if nothing follows), piece by piece as they come; without
    `streams` the whole completions in order, when all have ended. Raises RequestError."""
    if not streams:
        completed, usage = await collect_call(service, request_id, resolved)
        for index, one in enumerate(completed):
            yield index, one, usage if index == len(completed) - 1 else None
        return
    usage, num_unfinished = Usage(resolved), len(resolved.requests)
    with service.running.call(request_id, resolved) as call:
        async with contextlib.aclosing(call.deltas()) as deltas:
            async for index, delta in deltas:
                usage.add(index, delta)
                num_unfinished -= delta.finish_reason is not None
                yield index, delta, None if num_unfinished else usage


def tell_end(response: Response, finish_reason: str | None, new: New, usage: Usage | None) -> None:
    """Sets why the completion ended, and the usage if it was the last one."""
    if finish_reason is None:
        return
    response.finish_reason = finish_reason
    if isinstance(new.stop_reason, str):
        response.stop_string = new.stop_reason
    elif new.stop_reason is not None:
        response.stop_token_id = new.stop_reason
    if usage is not None:
        response.usage.CopyFrom(pb.Usage(**usage.counts()))


def tell_logprobs(response: Response, prompt: Sequence[int], new: New) -> None:
    """Sets those of the new tokens and of the prompt's, where there are any."""
    if new.logprobs is not None:
        response.logprobs.extend(_messages(new.token_ids, new.logprobs))
    if new.prompt_logprobs is not None:
        response.prompt_logprobs.extend(_messages(prompt[1:], new.prompt_logprobs))


def _messages(token_ids: Sequence[int], records: Records) -> list[pb.TokenLogprobs]:
    return [
        pb.TokenLogprobs(token_id=token, logprob=chosen, rank=rank, top_ids=ids, top_logprobs=best)
        for token, chosen, rank, ids, best in zip(
            token_ids, records.chosen, records.ranks, records.best_ids, records.best, strict=True
        )
    ]
