"""The one mutable record of a request on its way through the scheduler.

Who owns what (a number is in exactly one place):

    Sequence        identity, status, block table, block hashes, prefill progress; all tokens while it waits
    Lane            length of a decoding sequence in plan time, when it needs a block, when it reaches its limit
    SlotTable       who has which slot; all tokens of a resident sequence, a row per slot
    BlockPool       reference counts, prefix index, free blocks and blocks in limbo
    InFlightStep    what an unanswered plan computes, and for whom
    Replica         all of the above for one set of workers, and the one place where a sequence leaves
    WaitingQueue    the sequences without a replica

Plan time runs ahead of what workers have confirmed: a planned token counts although its value is not known yet.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from manta.scheduler.prefix import root_hash
from manta.scheduler.types import Request, Tokens

if TYPE_CHECKING:
    from manta.scheduler.group import Group


class Status(Enum):
    WAITING = "waiting"  # in the queue, without slot and blocks
    PREFILLING = "prefilling"  # tokens it entered with are still to be planned
    DECODING = "decoding"  # each step of its lane gives it one token
    DRAINING = "draining"  # the step of its last token is planned and not answered
    PARKED = "parked"  # a beam between two steps, or one that has just come here: with blocks, without slot
    MOVING = "moving"  # between two replicas, with blocks in both
    FINISHED = "finished"


@dataclass(slots=True)
class Beam:
    cumulative_logprob: float = 0.0  # of the output so far
    record: bytes = b""  # the answer to its step: the best tokens to go on with


@dataclass(slots=True, eq=False)
class Sequence:
    request: Request
    arrival: int  # how many requests came before
    max_length: int  # it stops growing at this many tokens
    tokens: Tokens  # while waiting: all there are; while resident: those it entered with
    root: bytes  # the parent of the first block's hash
    status: Status = Status.WAITING
    started: bool = False  # had a slot before
    moved_at: int = -1  # how many tokens it had when it last moved
    num_scored: int = 0  # tokens of the prompt, from the second on, whose records have come in

    group: "Group | None" = None
    beam: Beam | None = None  # of a beam's step: its group is a BeamGroup

    # Only while resident, or parked without slot and lane:
    replica: int = -1
    slot: int = -1
    lane: int = -1
    rank: tuple[int, int] = (0, 0)  # the highest rank is preempted first
    blocks: list[int] = field(default_factory=list)
    num_planned: int = 0  # prefill tokens in plans
    num_computed: int = 0  # prefill tokens confirmed; stays at len(tokens) from then on
    num_published: int = 0  # leading blocks that the prefix index has been told of

    hashes: list[bytes] = field(default_factory=list)  # of leading full blocks, as far as anyone asked
    passed_at: dict[int, int] = field(default_factory=dict)  # while waiting, by replica: when first left to others

    @classmethod
    def of(cls, request: Request, arrival: int, max_model_len: int) -> "Sequence":
        tokens = np.concatenate((request.prompt, request.output)).astype(np.int32, copy=False)
        max_length = min(len(request.prompt) + request.max_tokens, max_model_len)
        sequence = cls(request, arrival, max_length, tokens, root_hash(request.salt, request.adapter))
        if request.num_prompt_logprobs is None or len(request.output):  # the records came before the first output
            sequence.num_scored = sequence.num_to_score
        return sequence

    @property
    def num_to_score(self) -> int:
        """Tokens of the prompt that have others before them."""
        return len(self.request.prompt) - 1

    def stops_at(self, token: int, num_tokens: int) -> bool:
        """Whether `token` ends the sequence when it is the last of `num_tokens`."""
        request = self.request
        return token in request.stop_token_ids and num_tokens - len(request.prompt) >= request.min_tokens
