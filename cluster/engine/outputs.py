"""What offline generation returns, with vLLM's names."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from manta.cluster.engine.logprobs import Logprob


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # a stop token is among them
    finish_reason: str | None = None  # "stop" or "length"
    stop_reason: str | int | None = None  # the stop string or stop token id of the request that ended it
    cumulative_logprob: float | None = None  # the sum over token_ids, where log-probabilities were asked for
    logprobs: list[dict[int, Logprob]] | None = None  # per token: its own, then those of the most probable tokens


@dataclass(slots=True)
class BeamSearchSequence:
    """What a beam search found."""

    tokens: list[int]  # prompt and output
    cum_logprob: float  # of the output
    score: float  # cum_logprob / (number of generated tokens) ** length_penalty
    text: str | None = None  # of all tokens
    finish_reason: str | None = None  # "stop" or "length"


@dataclass(slots=True)
class BeamSearchOutput:
    """The sequences found for a prompt, best first."""

    sequences: list[BeamSearchSequence]


@dataclass(slots=True)
class RequestMetrics:
    """Seconds since the epoch, over all completions of the prompt."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its completions."""

    request_id: str
    prompt: str | None  # None when it was given as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    num_cached_tokens: int = 0  # prompt tokens whose KV the prefix cache held, for the first completion
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # per prompt token, None for the first; if asked for
    is_partial: bool = False  # one of a stream, with more to come

    @property
    def finished(self) -> bool:
        return not self.is_partial and all(output.finish_reason is not None for output in self.outputs)


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """The vector of a prompt."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """A prompt and its vector."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


@dataclass(frozen=True, slots=True)
class ScoringOutput:
    """How alike two texts are."""

    score: float  # -1 to 1


@dataclass(frozen=True, slots=True)
class ScoringRequestOutput:
    """Two texts and how alike they are."""

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: list[int]  # of the first text, then of the second one
    finished: bool = True


def cosine(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Of the angle between two vectors; 0 if one of them has no length."""
    norms = float(np.linalg.norm(first)) * float(np.linalg.norm(second))
    return float(np.dot(first, second)) / norms if norms else 0.0
