"""The client's side of one stream of EngineMessages: columns of tokens in, one queue per request out."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import replace

import numpy as np

from manta.cluster.engine.codec import encode_pooling, encode_sampling, int32_bytes
from manta.cluster.engine.types import (
    Beams,
    DrainingError,
    EngineError,
    GenerationRequest,
    InvalidRequestError,
    QueueFullError,
    TokenChunk,
    UnavailableError,
)
from manta.configs.pooling import Pooling
from manta.protos import engine_pb2 as pb


class RequestStream:
    """What one request has received and its reader has not taken yet."""

    __slots__ = (
        "_waiter", "delivered", "error", "finished", "handle", "handles", "logprobs", "prompt_logprobs", "request",
        "started", "tokens",
    )  # fmt: skip

    def __init__(self, handle: int, request: GenerationRequest, handles: range) -> None:
        self.handle = handle
        self.handles = handles  # of all sequences that were submitted with it, its own among them
        self.request = request
        self.delivered: list[int] = []  # tokens that the reader has taken
        self.tokens: list[int] = []  # and those that it has not
        self.logprobs: list[bytes] = []
        self.prompt_logprobs: list[bytes] = []
        self.started: pb.Started | None = None
        self.finished: pb.Finished | None = None
        self.error: EngineError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next_chunk(self) -> TokenChunk:
        """Waits until there is something; takes all of it. Raises the error that ended the request."""
        while not (self.tokens or self.finished or self.error):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self.error is not None:
            raise self.error
        chunk = TokenChunk(self.tokens)
        self.delivered += self.tokens
        self.tokens = []
        if self.logprobs or self.prompt_logprobs:
            chunk.logprobs, chunk.prompt_logprobs = b"".join(self.logprobs), b"".join(self.prompt_logprobs)
            self.logprobs, self.prompt_logprobs = [], []
        if self.started is not None:
            chunk.num_cached_tokens = self.started.num_cached_tokens
            chunk.queue_s = self.started.queue_s
        if self.finished is not None:
            chunk.finish_reason = self.finished.reason
            chunk.stop_token = self.finished.stop_token if self.finished.HasField("stop_token") else None
            chunk.error = self.finished.error
            chunk.vector = self.finished.vector
            if self.finished.HasField("cumulative_logprob"):
                chunk.cumulative_logprob = self.finished.cumulative_logprob
        return chunk


class StreamTable:
    """The open requests of one frontend, by handle."""

    def __init__(self) -> None:
        self._streams: dict[int, RequestStream] = {}
        self._last_handle = 0

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, requests: Sequence[GenerationRequest]) -> list[RequestStream]:
        """Of requests that are submitted together: their handles follow each other."""
        handles = range(self._last_handle + 1, self._last_handle + 1 + len(requests))
        self._last_handle += len(requests)
        streams = [RequestStream(handle, one, handles) for handle, one in zip(handles, requests, strict=True)]
        self._streams |= {stream.handle: stream for stream in streams}
        return streams

    def close(self, stream: RequestStream) -> None:
        del self._streams[stream.handle]

    def feed(self, message: pb.EngineMessage) -> None:
        """Hands the news to its requests; news of requests that were given up is dropped."""
        streams = self._streams
        for started in message.started:
            if (stream := streams.get(started.handle)) and stream.started is None:
                stream.started = started
        for logprobs in message.logprobs:
            if stream := streams.get(logprobs.handle):
                stream.logprobs.append(logprobs.sampled)
                stream.prompt_logprobs.append(logprobs.prompt)
        handles = np.frombuffer(message.handles, "<u8").tolist()
        tokens = np.frombuffer(message.tokens, "<i4").tolist()
        for handle, token in zip(handles, tokens, strict=True):
            if stream := streams.get(handle):
                stream.tokens.append(token)
                stream.wake()
        for finished in message.finished:
            if stream := streams.get(finished.handle):
                stream.finished = finished
                stream.wake()
        for refused in message.refused:
            if stream := streams.get(refused.handle):
                stream.error = refusal(refused)
                stream.wake()

    def resubmits(self) -> list[pb.FrontendMessage]:
        """What to tell an engine that knows of no open request, so that each goes on from the token it is at."""
        messages = []
        unended = {stream.handle: stream for stream in self._streams.values() if not (stream.finished or stream.error)}
        for stream in unended.values():
            if stream.request.beams is None:
                messages.append(pb.FrontendMessage(submit=_resubmit(stream)))
            elif stream.handle == min(unended.keys() & stream.handles):
                messages += _resubmit_search(stream, unended)
        return messages

    def fail_all(self, make_error: Callable[[], EngineError]) -> None:
        """Ends every open request with an error of its own."""
        for stream in self._streams.values():
            if stream.finished is None and stream.error is None:
                stream.error = make_error()
                stream.wake()


async def run_request(
    streams: StreamTable,
    request: GenerationRequest,
    send: Callable[[pb.FrontendMessage], None],
) -> AsyncIterator[TokenChunk]:
    """Submits, yields chunks up to the one with a finish_reason, and aborts if the reader leaves before that."""
    (stream,) = streams.open([request])
    ended = False
    try:
        send(pb.FrontendMessage(submit=build_submit(stream.handle, request)))
        while not ended:
            try:
                chunk = await stream.next_chunk()
            except EngineError:
                ended = True
                raise
            ended = chunk.finish_reason is not None
            yield chunk
    finally:
        streams.close(stream)
        if not ended:
            send(pb.FrontendMessage(abort=pb.Abort(handles=[stream.handle])))


class RequestGroup:
    """Several sequences of one prompt that are submitted together, when the first of them is read. `requests` differ as
    those of `resolve_sampling` do. Close it in the end: sequences that nobody began to read are aborted."""

    def __init__(
        self, streams: StreamTable, requests: Sequence[GenerationRequest], send: Callable[[pb.FrontendMessage], None]
    ) -> None:
        self._streams = streams
        self._requests = requests
        self._send = send
        self._unread: dict[int, RequestStream] | None = None  # by place; None before they are submitted

    async def chunks(self, place: int) -> AsyncGenerator[TokenChunk, None]:
        """As `run_request`, of requests[place]; once for each."""
        if self._unread is None:
            self._unread = dict(enumerate(self._streams.open(self._requests)))
            submit = build_submit(self._unread[0].handle, self._requests[0], len(self._requests))
            self._send(pb.FrontendMessage(submit=submit))
        stream = self._unread.pop(place)
        ended = False
        try:
            while not ended:
                try:
                    chunk = await stream.next_chunk()
                except EngineError:
                    ended = True
                    raise
                ended = chunk.finish_reason is not None
                yield chunk
        finally:
            self._give_up([stream], is_over=ended)

    def close(self) -> None:
        """May be called twice."""
        if self._unread:
            self._give_up(list(self._unread.values()), is_over=False)
            self._unread = {}

    def _give_up(self, streams: list[RequestStream], is_over: bool) -> None:
        for stream in streams:
            self._streams.close(stream)
        if not is_over:
            self._send(pb.FrontendMessage(abort=pb.Abort(handles=[stream.handle for stream in streams])))


def build_submit(handle: int, request: GenerationRequest, num_sequences: int = 1) -> pb.Submit:
    """Of several sequences `request` is the first. Raises ValueError when max_tokens or the seed is not resolved."""
    if request.pooling is not None:
        return _build_pooling(handle, request, request.pooling)
    sampling = request.sampling
    if sampling.max_tokens is None:
        raise ValueError("max_tokens must be resolved before a request is sent")
    return pb.Submit(
        handle=handle,
        request_id=request.request_id,
        prompt_tokens=int32_bytes(request.prompt_token_ids),
        output_tokens=int32_bytes(request.output_token_ids),
        max_tokens=sampling.max_tokens,
        ignore_eos=sampling.ignore_eos,
        stop_token_ids=sampling.stop_token_ids,
        sampling=encode_sampling(sampling, request.bad_words),
        priority=request.priority,
        tenant=request.tenant,
        cache_salt=request.cache_salt.encode(),
        num_sequences=num_sequences if num_sequences > 1 else 0,
        beams=None if request.beams is None else _encode_beams(request.beams),
    )


def _resubmit_search(stream: RequestStream, unended: dict[int, RequestStream]) -> list[pb.FrontendMessage]:
    """A search has told nothing before its end: it begins anew, for those that still wait."""
    submit = build_submit(stream.handles[0], stream.request, len(stream.handles))
    submit.resubmitted = True
    gone = [handle for handle in stream.handles if handle not in unended]
    messages = [pb.FrontendMessage(submit=submit)]
    return [*messages, pb.FrontendMessage(abort=pb.Abort(handles=gone))] if gone else messages


def _resubmit(stream: RequestStream) -> pb.Submit:
    """With the tokens that came. Who has tokens has been told of its prompt."""
    tokens = stream.delivered + stream.tokens
    request = stream.request
    if not tokens:
        stream.logprobs, stream.prompt_logprobs = [], []
    elif request.sampling.prompt_logprobs is not None:
        request = replace(request, sampling=request.sampling.model_copy(update={"prompt_logprobs": None}))
    submit = build_submit(stream.handle, replace(request, output_token_ids=[*request.output_token_ids, *tokens]))
    submit.resubmitted = True
    return submit


def _build_pooling(handle: int, request: GenerationRequest, pooling: Pooling) -> pb.Submit:
    return pb.Submit(
        handle=handle,
        request_id=request.request_id,
        prompt_tokens=int32_bytes(request.prompt_token_ids),
        priority=request.priority,
        tenant=request.tenant,
        cache_salt=request.cache_salt.encode(),
        pooling=encode_pooling(pooling),
    )


def _encode_beams(beams: Beams) -> pb.Beams:
    early_stopping = {False: pb.Beams.HEURISTIC, True: pb.Beams.AT_ONCE, "never": pb.Beams.NEVER}[beams.early_stopping]
    return pb.Beams(width=beams.width, length_penalty=beams.length_penalty, early_stopping=early_stopping)


def refusal(refused: pb.Refused) -> EngineError:
    """The typed error of a request that never entered the engine."""
    match refused.code:
        case pb.Refused.INVALID:
            return InvalidRequestError(refused.message)
        case pb.Refused.QUEUE_FULL:
            return QueueFullError(refused.message, refused.retry_after_s)
        case pb.Refused.DRAINING:
            return DrainingError(refused.message)
        case _:
            return UnavailableError(refused.message)
