"""An engine client without an engine: a deterministic fake model behind the interface that frontends use."""

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from manta.cluster.engine.client import EngineError, EngineLostError, GenerationRequest, TokenChunk
from manta.cluster.engine.types import BACKGROUND
from manta.protos import engine_pb2 as pb

Model = Callable[[GenerationRequest], Sequence[int]]


class FakeGroup:
    """Requests that run side by side."""

    def __init__(
        self, requests: Sequence[GenerationRequest], streams: Sequence[AsyncGenerator[TokenChunk, None]]
    ) -> None:
        self.requests = requests
        self._streams = streams
        self.is_closed = False

    def chunks(self, place: int) -> AsyncGenerator[TokenChunk, None]:
        return self._streams[place]

    def close(self) -> None:
        self.is_closed = True


class FakeClient:
    """Implements `manta.cluster.engine.client.Client`.

    `model` gives the tokens that follow a request's prompt (`hashed_tokens` if not given); they end with
    `eos_token_id`, a stop token of the request, or max_tokens. Everything below can be set while it runs.
    """

    def __init__(self, model: Model | None = None, vocab_size: int = 512, eos_token_id: int = 1) -> None:
        self.model: Model = model or (lambda request: hashed_tokens(request, vocab_size))
        self.eos_token_id = eos_token_id
        self.refusal: EngineError | None = None  # raised instead of the first chunk
        self.lost_after: int | None = None  # so many tokens, then the connection breaks
        self.hang_after: int | None = None  # so many tokens, then nothing more
        self.tokens_per_chunk = 1
        self.block_size = 16
        self.healthy = True
        self.detail = ""
        self.submitted: list[GenerationRequest] = []
        self.groups: list[FakeGroup] = []
        self.finished: list[str] = []
        self.aborted: list[str] = []  # closed before their end
        self.tables = pb.BlockTablesResponse(num_blocks=64, num_free_blocks=64, block_size=self.block_size)
        self.is_closed = False
        self._seen_blocks: set[bytes] = set()

    def reset(self) -> None:
        """As new."""
        self.__dict__.clear()
        FakeClient.__init__(self)

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        return self._generate(request)

    def generate_group(self, requests: Sequence[GenerationRequest]) -> "FakeGroup":
        self.groups.append(FakeGroup(requests, [self._generate(request) for request in requests]))
        return self.groups[-1]

    async def _generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        assert request.sampling.n == 1
        assert request.sampling.max_tokens is not None
        assert request.sampling.seed is not None
        if self.refusal is not None:
            raise self.refusal
        self.submitted.append(request)
        has_ended = False
        try:
            num_cached_tokens = self._cache(request)
            num_sent = 0
            for chunk in self._chunks(request):
                await asyncio.sleep(0)
                await self._break_or_hang(num_sent)
                chunk.num_cached_tokens = num_cached_tokens if num_sent == 0 else 0
                num_sent += len(chunk.token_ids)
                has_ended = chunk.finish_reason is not None
                yield chunk
        finally:
            (self.finished if has_ended else self.aborted).append(request.request_id)

    async def _break_or_hang(self, num_sent: int) -> None:
        if self.lost_after is not None and num_sent >= self.lost_after:
            raise EngineLostError("the connection to the engine broke")
        if self.hang_after is not None and num_sent >= self.hang_after:
            await asyncio.Event().wait()

    def _chunks(self, request: GenerationRequest) -> list[TokenChunk]:
        if request.pooling is not None:
            return [TokenChunk([], "stop", vector=fake_vector(request).tobytes())]
        tokens, stop_token = self._until_end(request)
        sampling, prompt = request.sampling, [int(token) for token in request.prompt_token_ids]
        chunks = [
            TokenChunk(part, logprobs=fake_records(part, sampling.logprobs))
            for start in range(0, len(tokens), self.tokens_per_chunk)
            if (part := tokens[start : start + self.tokens_per_chunk])
        ]
        chunks[0].prompt_logprobs = fake_records(prompt[1:], sampling.prompt_logprobs)
        chunks[-1].finish_reason = "length" if stop_token is None else "stop"
        chunks[-1].stop_token = stop_token
        return chunks

    def _until_end(self, request: GenerationRequest) -> tuple[list[int], int | None]:
        sampling = request.sampling
        stop_tokens = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stop_tokens.add(self.eos_token_id)
        tokens: list[int] = []
        for token in [*self.model(request), self.eos_token_id]:
            tokens.append(int(token))
            if token in stop_tokens and len(tokens) > sampling.min_tokens:
                return tokens, int(token)
            if len(tokens) == sampling.max_tokens:
                break
        return tokens, None

    def _cache(self, request: GenerationRequest) -> int:
        """Prompt tokens in full blocks seen before, never the whole prompt."""
        prompt = np.asarray(request.prompt_token_ids, np.int32)
        num_cached = 0
        for end in range(self.block_size, len(prompt), self.block_size):
            key = request.cache_salt.encode() + prompt[:end].tobytes()
            if key in self._seen_blocks:
                num_cached = end
            self._seen_blocks.add(key)
        return num_cached

    async def info(self) -> pb.InfoResponse:
        return pb.InfoResponse(num_blocks=64, block_size=self.block_size, max_model_len=256, device="fake")

    async def load(self) -> pb.LoadResponse:
        num_running = len(self.submitted) - len(self.finished) - len(self.aborted)
        ended = {*self.finished, *self.aborted}
        low = [each for each in self.submitted if each.priority == BACKGROUND and each.request_id not in ended]
        return pb.LoadResponse(
            num_running=num_running, num_free_blocks=64, num_blocks=64, healthy=self.healthy, detail=self.detail,
            num_background=len(low),
        )  # fmt: skip

    async def metrics(self) -> bytes:
        return b"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0\n"

    async def block_tables(self) -> pb.BlockTablesResponse:
        return self.tables

    async def drain(self, timeout_s: float) -> bool:
        return True

    async def close(self) -> None:
        self.is_closed = True


def hashed_tokens(request: GenerationRequest, vocab_size: int) -> list[int]:
    """Pseudo-random tokens that depend on the prompt and, unless greedy, on the seed; ids 0 to 3 do not occur."""
    seed = 0 if request.sampling.is_greedy else int(request.sampling.seed or 0) % 2**32
    key = zlib.crc32(np.asarray(request.prompt_token_ids, np.int32).tobytes(), seed)
    draws = np.random.default_rng(key).integers(4, vocab_size, size=request.sampling.max_tokens or 1)
    return [int(token) for token in draws]


def fake_vector(request: GenerationRequest) -> NDArray[np.float32]:
    """Of the prompt's tokens: how many there are, then their sums of powers; of length 1 where it should be."""
    assert request.pooling is not None
    tokens = np.asarray(request.prompt_token_ids, np.float64) / 512
    powers = np.arange(request.pooling.dimensions, dtype=np.float64)[:, None]
    vector = (tokens**powers).sum(axis=1)
    return (vector / np.linalg.norm(vector) if request.pooling.normalize else vector).astype("<f4")


def fake_records(tokens: Sequence[int], num_best: int | None) -> bytes:
    """Of each token: log-probability -token / 8, rank token % 5 + 1; the best are 5, 6, 7, ... with -0.25, -0.5, ..."""
    if num_best is None:
        return b""
    words = []
    for token in tokens:
        words += [np.array([-token / 8], "<f4").tobytes(), np.array([token % 5 + 1], "<i4").tobytes()]
        words.append(np.arange(5, 5 + num_best, dtype="<i4").tobytes())
        words.append((np.arange(1, 1 + num_best) * -0.25).astype("<f4").tobytes())
    return b"".join(words)
