"""What offline generation returns, with vLLM's names."""

from dataclasses import dataclass, field

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
