"""Calls under way: from resolved requests to a stream of text deltas, with abort from outside."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Protocol, cast

from manta.cluster.doors.caller import current_tenant
from manta.cluster.doors.errors import Kind, RequestError, draining, from_engine
from manta.cluster.doors.output import Delta, OutputText, joined, without_output
from manta.cluster.doors.text import Tokenizer
from manta.cluster.doors.validate import Resolved
from manta.cluster.engine.client import Client, EngineError, GenerationRequest, Group, TokenChunk

# From so many prompt tokens on, completions 1 to n-1 that follow a grammar start when completion 0 has its first token:
# each waits for the grammar by itself, and so they find the prompt in the prefix cache instead of all computing it side
# by side. Others are submitted together. Where the prompt's log-probabilities are asked for, which come with completion
# 0, the others are read after them.
SHARED_PROMPT_TOKENS = 64

IndexedDelta = tuple[int, Delta]  # the number of the completion within the call, and what is new of it


class Call:
    """One call of a client: one engine request per completion, or per candidate for one. Built by `Running.call`."""

    def __init__(self, client: Client, tokenizer: Tokenizer, resolved: Resolved) -> None:
        self.tenant = current_tenant()
        self._client = client
        self._tokenizer = tokenizer
        self._resolved = resolved
        self._aborted = False
        self._waiting: set[asyncio.Task[object]] = set()  # tasks that wait for tokens right now
        self._prompt_computed = [asyncio.Event() for _ in resolved.prompts]

    def abort(self) -> None:
        """Ends all completions with finish_reason "abort"."""
        self._aborted = True
        for event in self._prompt_computed:
            event.set()
        for task in self._waiting:
            task.cancel()

    def deltas(self) -> AsyncGenerator[IndexedDelta, None]:
        """Yields until every completion has a finish_reason. Closing it early aborts the rest. Raises RequestError.

        A consumer that is slow slows the reading from the engine down; nothing piles up here.
        """
        if len(self._resolved.requests) == 1 and not self._resolved.candidates:
            return self._deltas_of(0, 0, self._resolved.requests[0], None)
        return self._deltas_of_groups()

    async def _deltas_of_groups(self) -> AsyncGenerator[IndexedDelta, None]:
        resolved, groups = self._resolved, []
        streams = []
        for place in range(len(resolved.prompts)):
            requests = resolved.candidates[place] if resolved.candidates else self._requests_of(place)
            group = None
            if requests[0].beams is not None or (len(requests) > 1 and not requests[0].sampling.structured_outputs):
                group = self._client.generate_group(requests)
                groups.append(group)
            deltas = [self._deltas_of(place, index, request, group) for index, request in enumerate(requests)]
            streams += [self._best_of(place, deltas)] if resolved.candidates else deltas
        try:
            async with contextlib.aclosing(_merge(streams, len(resolved.requests))) as merged:
                async for item in merged:
                    yield item
        finally:
            for group in groups:
                group.close()

    def _requests_of(self, prompt_index: int) -> list[GenerationRequest]:
        n = self._resolved.n
        return self._resolved.requests[prompt_index * n : (prompt_index + 1) * n]

    async def _best_of(
        self, prompt_index: int, streams: list[AsyncGenerator[IndexedDelta, None]]
    ) -> AsyncGenerator[IndexedDelta, None]:
        """Of all candidates, when they have ended, the most probable ones: each in one delta."""
        ended = [Delta("", []) for _ in streams]
        first = self._resolved.requests[prompt_index * self._resolved.n].sampling
        async with contextlib.aclosing(_merge(streams, len(streams))) as merged:
            async for index, delta in merged:
                place = index - prompt_index * self._resolved.n
                ended[place] = joined(ended[place], delta)
        prompt_logprobs = ended[0].prompt_logprobs
        ended.sort(key=lambda one: sum(one.logprobs.chosen) if one.logprobs else 0.0, reverse=True)
        for place, one in enumerate(ended[: self._resolved.n]):
            told = one if first.logprobs is not None else replace(one, logprobs=None, offsets=[])
            told.prompt_logprobs = prompt_logprobs if place == 0 else None
            yield prompt_index * self._resolved.n + place, told

    async def _deltas_of(
        self, prompt_index: int, completion: int, request: GenerationRequest, group: Group | None
    ) -> AsyncGenerator[IndexedDelta, None]:
        index = prompt_index * self._resolved.n + completion
        prompt = self._resolved.prompts[prompt_index]
        first = self._resolved.requests[prompt_index * self._resolved.n]
        asks_about_prompt = first.sampling.prompt_logprobs is not None
        waits = group is None and len(prompt) >= SHARED_PROMPT_TOKENS
        if completion > 0 and (asks_about_prompt or waits):
            await self._prompt_computed[prompt_index].wait()
        output = OutputText(self._tokenizer, request.sampling, prompt, self._resolved.visible_tokens)
        generated = self._client.generate(request) if group is None else group.chunks(completion)
        stream = cast(AsyncGenerator[TokenChunk, None], generated)
        async with contextlib.aclosing(stream) as chunks:
            while True:
                chunk = await self._next(chunks)
                delta = output.abort() if chunk is None else output.push(chunk)
                if self._resolved.is_prompt_only:
                    delta = without_output(delta)
                if completion == 0:
                    self._prompt_computed[prompt_index].set()
                yield index, delta
                if delta.finish_reason is not None:
                    return

    async def _next(self, chunks: AsyncGenerator[TokenChunk, None]) -> TokenChunk | None:
        """The next chunk, None when the call is aborted."""
        if self._aborted:
            return None
        task = cast("asyncio.Task[object]", asyncio.current_task())
        self._waiting.add(task)
        try:
            chunk = await anext(chunks)
        except asyncio.CancelledError:
            if self._aborted and task.uncancel() == 0:
                return None
            raise  # the client has gone
        except StopAsyncIteration:
            message = "the engine ended the request without a reason"
            raise RequestError(message, code="internal_error", kind=Kind.INTERNAL)
        except EngineError as error:
            raise from_engine(error)
        finally:
            self._waiting.discard(task)
        if chunk.finish_reason == "error":
            message = chunk.error or "the engine failed while it ran this request"
            raise RequestError(message, code="internal_error", kind=Kind.INTERNAL)
        return chunk


async def _merge(
    streams: list[AsyncGenerator[IndexedDelta, None]], num_completions: int
) -> AsyncGenerator[IndexedDelta, None]:
    """Deltas of so many completions as they come. The first error ends them all."""
    queue: asyncio.Queue[IndexedDelta | Exception] = asyncio.Queue(maxsize=len(streams))

    async def pump(stream: AsyncGenerator[IndexedDelta, None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for item in stream:
                    await queue.put(item)
        except Exception as error:  # noqa: BLE001 - raised again by the reader of the queue
            await queue.put(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        num_unfinished = num_completions
        while num_unfinished:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            num_unfinished -= item[1].finish_reason is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Abortable(Protocol):
    """A call under way."""

    tenant: str

    def abort(self) -> None: ...


class Running:
    """The calls under way in this frontend, by tenant and id; both doors share it."""

    def __init__(self, client: Client, tokenizer: Tokenizer) -> None:
        self.is_draining = False
        self._client = client
        self._tokenizer = tokenizer
        self._calls: dict[tuple[str, str], Abortable] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._calls)

    def __contains__(self, request_id: str) -> bool:
        return (current_tenant(), request_id) in self._calls

    @contextlib.contextmanager
    def call(self, request_id: str, resolved: Resolved) -> Iterator[Call]:
        """The call is known under `request_id` until the block ends. Raises RequestError if it is taken or draining."""
        call = Call(self._client, self._tokenizer, resolved)
        with self.track(request_id, call):
            yield call

    @contextlib.contextmanager
    def track(self, request_id: str, call: Abortable) -> Iterator[None]:
        """As `call`, for one that is there already."""
        self.check_open()
        key = call.tenant, request_id
        if key in self._calls:
            message = f"request_id {request_id!r} is in use by a running request"
            raise RequestError(message, "request_id", "duplicate_request_id", Kind.DUPLICATE)
        self._calls[key] = call
        self._idle.clear()
        try:
            yield
        finally:
            del self._calls[key]
            if not self._calls:
                self._idle.set()

    def check_open(self) -> None:
        """Raises RequestError while draining."""
        if self.is_draining:
            raise draining()

    def abort(self, request_id: str) -> bool:
        """False when the tenant at the door has no such call running."""
        call = self._calls.get((current_tenant(), request_id))
        if call is None:
            return False
        call.abort()
        return True

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new calls; True when all have ended in time, False when the rest was aborted."""
        self.is_draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
            return True
        for call in self._calls.values():
            call.abort()
        return False
