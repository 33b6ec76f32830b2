"""What completions and chat have in common: stream options, events, and running a call to its answer."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from manta.cluster.doors.checks import check_bool, shown
from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.exchange import Reply, is_request_id
from manta.cluster.doors.fields import check_fields
from manta.cluster.doors.generation import IndexedDelta
from manta.cluster.doors.output import Delta
from manta.cluster.doors.service import Service
from manta.cluster.doors.usage import Usage
from manta.cluster.doors.validate import Resolved
from manta.cluster.engine.logprobs import Records, no_records

HEADERS_AFTER_S = 1.0  # a refusal by the engine comes sooner and still gets its own HTTP status
_STREAM_OPTIONS = frozenset({"include_usage", "continuous_usage_stats"})
# Options of newer OpenAI clients that change only how chunks are padded.
_IGNORED_STREAM_OPTIONS = frozenset({"include_obfuscation"})


@dataclass(frozen=True, slots=True)
class Options:
    """How the answer is given; what is generated is in Resolved."""

    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    tokens_as_ids: bool = False  # in log-probabilities


def read_options(fields: dict[str, Any]) -> Options:
    stream = check_bool(fields.get("stream", False), "stream")
    wanted = fields.get("stream_options")
    if wanted is None:
        wanted = {}
    elif not stream:
        raise RequestError("stream_options needs stream=true", "stream_options")
    if not isinstance(wanted, dict):
        raise RequestError(f"stream_options must be an object, not {shown(wanted)}", "stream_options", "invalid_type")
    for name in wanted.keys() - _STREAM_OPTIONS - _IGNORED_STREAM_OPTIONS:
        message = f"unknown field 'stream_options.{name}'; known ones: {', '.join(sorted(_STREAM_OPTIONS))}"
        raise RequestError(message, f"stream_options.{name}", "unknown_parameter")
    values = {name: check_bool(wanted[name], f"stream_options.{name}") for name in _STREAM_OPTIONS & wanted.keys()}
    continuous = values.get("continuous_usage_stats", False)
    return_token_ids = check_bool(fields.get("return_token_ids", False), "return_token_ids")
    as_ids = check_bool(fields.get("return_tokens_as_token_ids", False), "return_tokens_as_token_ids")
    if stream and fields.get("prompt_logprobs") is not None:
        raise RequestError("prompt_logprobs are not told in a stream; set stream=false", "prompt_logprobs")
    return Options(stream, values.get("include_usage", continuous), continuous, return_token_ids, as_ids)


def read_request_id(fields: dict[str, Any], header: str) -> str:
    """The body's request_id, else the one of the X-Request-Id header."""
    wanted = fields.get("request_id", header)
    if not isinstance(wanted, str) or not is_request_id(wanted):
        message = "request_id must be up to 128 printable ASCII characters without spaces"
        raise RequestError(message, "request_id")
    return wanted


class EventFormat(Protocol):
    """How one API writes its choices. `choices` gives the inside of each `choices: [{...}]`, without braces."""

    def choices(self, index: int, delta: Delta) -> list[bytes]: ...


class Events:
    """Server-sent events of one call. What does not change from chunk to chunk is encoded once."""

    def __init__(self, head: dict[str, Any], usage: Usage, options: Options) -> None:
        self._start = b"data: " + orjson.dumps(head)[:-1] + b',"choices":['
        self._usage = usage
        self._options = options
        self._end = b'}],"usage":null}\n\n' if options.include_usage else b"}]}\n\n"

    def encode(self, choices: list[bytes]) -> bytes:
        end = self._end
        if self._options.continuous_usage:
            end = b'}],"usage":' + orjson.dumps(self._usage.body()) + b"}\n\n"
        start = self._start + b"{"
        return b"".join([start + choice + end for choice in choices])

    def last(self) -> bytes:
        """The usage chunk, where it was asked for."""
        if not self._options.include_usage:
            return b""
        return self._start + b'],"usage":' + orjson.dumps(self._usage.body()) + b"}\n\n"


async def stream_call(
    service: Service, head: dict[str, Any], resolved: Resolved, options: Options, form: EventFormat, reply: Reply
) -> None:
    """Streams the call as events. Raises RequestError; before the first event it still is an HTTP status."""
    usage = Usage(resolved)
    events = Events(head, usage, options)
    with service.running.call(head["id"], resolved) as call:
        async with contextlib.aclosing(started(call.deltas(), reply)) as deltas:
            async for index, delta in deltas:
                usage.add(index, delta)
                choices = form.choices(index, delta)
                if choices:
                    await reply.events(events.encode(choices))
        await reply.end_events(events.last())


async def started(
    deltas: AsyncGenerator[IndexedDelta, None], reply: Reply, opening: bytes = b""
) -> AsyncGenerator[IndexedDelta, None]:
    """The same deltas; the headers go out with the first of them, or when it takes long, and behind them the events
    `opening`."""
    async with contextlib.aclosing(deltas):
        first = asyncio.ensure_future(anext(deltas))
        try:
            done, _ = await asyncio.wait({first}, timeout=HEADERS_AFTER_S)
            if not done:
                await _open_stream(reply, opening)
            item = await first
        finally:
            if first.cancel():
                await asyncio.wait({first})
        if done:
            await _open_stream(reply, opening)
        yield item
        async for item in deltas:
            yield item


async def _open_stream(reply: Reply, opening: bytes) -> None:
    await reply.start_events()
    if opening:
        await reply.events(opening)


@dataclass(slots=True)
class Completed:
    """One finished completion."""

    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: str | int | None
    logprobs: Records | None = None  # of the token_ids
    offsets: list[int] = field(default_factory=list)  # characters of the text before each token
    prompt_logprobs: Records | None = None

    def add(self, delta: Delta) -> None:
        """Takes all but the text."""
        self.token_ids += delta.token_ids
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        if delta.logprobs is not None:
            self.logprobs = self.logprobs or no_records()
            self.logprobs.extend(delta.logprobs)
            self.offsets += delta.offsets
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs


async def collect_call(service: Service, request_id: str, resolved: Resolved) -> tuple[list[Completed], Usage]:
    """Runs the call to its end: one Completed per request, in order. Raises RequestError."""
    usage = Usage(resolved)
    texts: list[list[str]] = [[] for _ in resolved.requests]
    completed = [Completed("", [], None, None) for _ in resolved.requests]
    with service.running.call(request_id, resolved) as call:
        async with contextlib.aclosing(call.deltas()) as deltas:
            async for index, delta in deltas:
                usage.add(index, delta)
                texts[index].append(delta.text)
                completed[index].add(delta)
    for one, pieces in zip(completed, texts, strict=True):
        one.text = "".join(pieces)
    return completed, usage


def new_head(service: Service, kind: str, request_id: str) -> dict[str, Any]:
    """The fields that every object and chunk of an answer begins with."""
    return {
        "id": request_id,
        "object": kind,
        "created": int(time.time()),
        "model": service.config.model_name,
    }


def read_fields(service: Service, body: dict[str, Any], used: frozenset[str]) -> dict[str, Any]:
    """Refuses work early while the server drains, then unknown fields."""
    service.running.check_open()
    return check_fields(body, used)
