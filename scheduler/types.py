"""What goes into the scheduler and what comes out. The proto in `protos/worker.proto` mirrors StepPlan and StepResult
and states the rules by which a worker turns differences into rows."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

# fmt: off
Tokens = NDArray[np.int32]
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Pooling:
    """The answer to a prompt is one vector of so many bytes, and no tokens. `params` are opaque, for the worker."""

    num_bytes: int
    needs_all: bool                      # what the model computes of every token counts: none is taken from the cache
    params: Any = None


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued once, or with `pooling` not at all. `sampling` is opaque here and handed to the worker
    as it is."""

    id: int                              # unique among the requests the scheduler holds
    prompt: Tokens
    max_tokens: int                      # generated tokens in all, `output` included
    sampling: Any = None
    stop_token_ids: frozenset[int] = frozenset()  # end-of-sequence ids included unless the request ignores them
    min_tokens: int = 0                  # stop_token_ids do not count before so many generated tokens
    arrival_s: float = 0.0
    priority: int = 0                    # lower runs first under the "priority" policy
    tenant: str = ""
    adapter: str = ""
    salt: bytes = b""                    # requests share cached blocks only under the same salt
    output: Tokens = field(default_factory=lambda: np.empty(0, np.int32))  # generated elsewhere before (a resubmit)
    name: str = ""                       # the client's request id, for people
    num_logprobs: int | None = None      # each token comes with a record of so many of the best; None: with none
    num_prompt_logprobs: int | None = None  # so do the prompt's tokens, the first one excepted
    pooling: Pooling | None = None       # max_tokens is 0 then

    @property
    def asks_logprobs(self) -> bool:
        return self.num_logprobs is not None or self.num_prompt_logprobs is not None


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one replica can hold, as its workers report it."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_lanes: int = 1                   # pipeline stages: lanes with work take turns, a sequence is in one of them

    @property
    def max_in_flight(self) -> int:
        """Plans sent and not yet answered: enough that the device never waits for the next one."""
        return self.num_lanes + 1


@dataclass(frozen=True, slots=True)
class SeqAdd:
    slot: int
    lane: int
    tokens: Tokens                       # prompt, and after a preemption what was generated so far
    num_prompt_tokens: int
    num_computed: int
    max_length: int
    blocks: list[int]
    sampling: Any
    pooling: Any = None                  # not None: the slot's prompt becomes a vector


@dataclass(slots=True)  # not frozen, which would make it three times as long to build
class StepPlan:
    """Differences against the replica's previous plan, applied in the order of the fields."""

    epoch: int
    step: int
    lane: int
    frees: list[int]                     # slots
    adds: list[SeqAdd]
    grow: list[tuple[int, int]]          # (slot, block)
    copies: list[tuple[int, int]]        # (source block, destination block)
    holds: list[int]                     # decoding slots of this lane that sit out this step
    prefill: list[tuple[int, int]]       # (slot, tokens to compute)
    num_decodes: int                     # for metrics and step deadlines; not sent
    num_tokens: int


@dataclass(slots=True)
class StepResult:
    epoch: int
    step: int
    tokens: Tokens                       # one per sampled row, in row order
    logprobs: bytes = b""                # records of those that asked, as worker.proto has them; opaque here
    vectors: bytes = b""                 # of the prompts that end with one, in row order


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Records of one request: of tokens of its prompt, or of one that it got."""

    request_id: int
    prompt: bytes
    sampled: bytes


def record_bytes(num_best: int | None) -> int:
    """Of the record of one token with so many of the best; 0 where none is asked for."""
    return 0 if num_best is None else 8 + 8 * num_best


@dataclass(frozen=True, slots=True)
class Started:
    """A request got its first slot."""

    request: Request
    num_cached_tokens: int
    is_follower: bool = False            # another one's prompt is its own: nothing is looked up, nothing computed


@dataclass(frozen=True, slots=True)
class Finished:
    request: Request
    reason: FinishReason
    stop_token: int | None = None
    num_output_tokens: int = 0
    cumulative_logprob: float | None = None  # of the output; told of what a beam search found
    vector: bytes = b""                  # the answer, where it was asked for
    error: str = ""                      # for the user, with reason "error"


@dataclass(slots=True)
class Events:
    """What the outside must hear of after a call. The request with id `request_ids[i]` got `tokens[i]`; a stop token
    is among them. Nobody writes to the arrays."""

    request_ids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    tokens: Tokens = field(default_factory=lambda: np.empty(0, np.int32))
    started: list[Started] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)  # a token's record comes with it, a prompt's before tokens


class RefusedError(ValueError):
    """The request was not taken; the message is one sentence for the user."""


class TooLongError(RefusedError):
    """It can never fit the context or the pool; retrying cannot help."""


class QueueFullError(RefusedError):
    """It may be taken later."""


class WrongResultError(RuntimeError):
    """A worker's answer does not belong to the plan it should answer; `Scheduler.reset` is what helps."""


@dataclass(slots=True)
class Counters:
    """Totals since the scheduler began."""

    num_prefix_queries: int = 0          # tokens of admitted requests that were looked up in the prefix index
    num_prefix_hits: int = 0             # tokens among them whose KV was there
    num_preemptions: int = 0
    num_moves_copied: int = 0            # sequences that began to move to another replica with their blocks
    num_moves_recomputed: int = 0        # sequences that moved without, because computing them again was cheaper
    num_moves_failed: int = 0            # of those copied: the copy did not come about, they were computed again
