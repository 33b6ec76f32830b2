"""What a frontend hands to the engine and hears back, and the errors it can meet."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from manta.configs.pooling import Pooling
from manta.configs.sampling import SamplingParams

BACKGROUND = 2**31 - 1  # the priority of requests that only fill what all others leave


@dataclass(frozen=True, slots=True)
class Beams:
    """A beam search: transformers' num_beams, length_penalty and early_stopping."""

    width: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to be continued once. Every default is resolved: see `resolve_sampling`."""

    request_id: str  # the client's, for logs and block table pictures
    prompt_token_ids: NDArray[np.int32] | Sequence[int]
    sampling: SamplingParams  # n is 1; max_tokens and seed are set
    priority: int = 0  # lower runs first under the "priority" policy
    tenant: str = ""
    cache_salt: str = ""  # requests share cached blocks only under the same salt
    output_token_ids: NDArray[np.int32] | Sequence[int] = ()  # delivered already: a resubmit
    bad_words: Sequence[Sequence[int]] = ()  # the tokens of sampling.bad_words
    beams: Beams | None = None  # it gets a hypothesis of this search, with all its tokens in one chunk
    pooling: Pooling | None = None  # it gets a vector, in one chunk without tokens; `sampling` does not count


UNSAMPLED = SamplingParams.model_validate({"max_tokens": 1, "seed": 0})  # of requests with pooling


@dataclass(slots=True)
class TokenChunk:
    """The tokens of one request since its previous chunk; the last chunk has a finish_reason."""

    token_ids: list[int]  # a stop token is among them
    finish_reason: str | None = None  # "stop", "length", "abort", "error"; None: more is coming
    stop_token: int | None = None  # the token that ended the request, when one did
    num_cached_tokens: int = 0  # prompt tokens whose KV the prefix cache held
    queue_s: float = 0.0  # from submission to the first slot
    error: str = ""  # one sentence, with finish_reason "error"
    cumulative_logprob: float | None = None  # of all tokens, at the end of a hypothesis of a beam search
    logprobs: bytes = b""  # a record per token, where asked for: see `logprobs.read_records`
    prompt_logprobs: bytes = b""  # of the prompt's tokens, from the second on: all of them in the first chunk
    vector: bytes = b""  # float32, of a prompt that is pooled


class EngineError(Exception):
    """The engine did not run a request to its end; the message is one sentence for the user."""


class InvalidRequestError(EngineError):
    """The request can never run here (too long, a token outside the vocabulary); retrying cannot help."""


class QueueFullError(EngineError):
    """Too much is waiting already; the same request may be taken after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DrainingError(EngineError):
    """The engine takes no new requests because it is shutting down."""


class UnavailableError(EngineError):
    """No replica can run the request now."""


class EngineLostError(EngineError):
    """The connection to the engine broke; what became of the request there is not known."""


def resolve_sampling(
    sampling: SamplingParams, num_prompt_tokens: int, max_model_len: int, seed: int | None = None
) -> list[SamplingParams]:
    """One SamplingParams per sequence (`num_sequences`), each with n=1, max_tokens and its own seed.

    max_tokens None becomes what the context still holds. Completion i draws with seed + i; without a seed in
    `sampling` the first is `seed`, or random. The first one alone asks about the prompt.
    """
    first = sampling.seed if sampling.seed is not None else seed
    if first is None:
        first = secrets.randbits(63)
    max_tokens = sampling.max_tokens
    if max_tokens is None:
        max_tokens = max(max_model_len - num_prompt_tokens, 1)
    update: dict[str, int | None] = {"n": 1, "best_of": None, "max_tokens": max_tokens}
    if sampling.num_sequences > sampling.n and sampling.logprobs is None:
        update["logprobs"] = 0  # they are ranked by it
    resolved = []
    for i in range(sampling.num_sequences):
        resolved.append(sampling.model_copy(update=update | {"seed": (first + i) % 2**64}))
        update["prompt_logprobs"] = None
    return resolved


def beams_of(sampling: SamplingParams) -> Beams | None:
    """The search that is asked for."""
    if not sampling.use_beam_search:
        return None
    return Beams(sampling.best_of or sampling.n, sampling.length_penalty, sampling.early_stopping)


def num_prompt_tokens_kept(sampling: SamplingParams, max_model_len: int) -> int | None:
    """How many tokens of a prompt truncate_prompt_tokens leaves, the last ones; None for all."""
    keep = sampling.truncate_prompt_tokens
    return max(max_model_len - (sampling.max_tokens or 1), 1) if keep == -1 else keep
