"""Sequences that share a prompt: the samples of one request, or the beams of one search.

One of them, the leader, is queued alone. When a step is planned that computes the last of its prompt, the others
become followers of its replica: each takes the blocks of a member that is there by reference, with a copy of the last
one where that is not full, and computes the one token that is left, to sample from it what comes next. So the prompt is
computed once, with or without the prefix index.
"""

from dataclasses import dataclass, field

import numpy as np

from manta.scheduler.beam_search import BeamSearch, Row
from manta.scheduler.sequence import Sequence, Status
from manta.scheduler.types import Request


@dataclass(slots=True, eq=False)
class Group:
    members: list[Sequence] = field(default_factory=list)  # those that have not ended
    pending: list[Sequence] = field(default_factory=list)  # members that wait for a leader

    def has_leader(self) -> bool:
        """Whether somebody will call those that are pending."""
        return any(
            member.status in (Status.PREFILLING, Status.MOVING)
            or (member.status is Status.WAITING and member not in self.pending)
            or (member.status is Status.PARKED and member.beam is None)  # it will compute what is left of it
            for member in self.members
        )

    def donor(self, sequence: Sequence, replica: int) -> tuple[Sequence, int] | None:
        """The member in the replica that has computed most of what the sequence needs, and how many tokens that is; one
        is always left to compute. Steps planned earlier have computed what a donor has."""
        best: tuple[Sequence, int] | None = None
        for member in self.members:
            if member.replica != replica or member.status not in _DONORS or not member.blocks:
                continue
            limit = min(member.num_planned, len(sequence.tokens) - 1)
            unequal = np.flatnonzero(member.tokens[:limit] != sequence.tokens[:limit])
            num_common = int(unequal[0]) if len(unequal) else limit
            if best is None or num_common > best[1]:
                best = member, num_common
            if num_common == len(sequence.tokens) - 1:
                break
        return best

    def awaits_donor(self, sequence: Sequence, replica: int) -> bool:
        """Whether it should wait for a member in the replica that is about to be a donor, the first one there."""
        is_prefilling = any(member.replica == replica and member.status is Status.PREFILLING for member in self.members)
        return is_prefilling and self.donor(sequence, replica) is None


@dataclass(slots=True, eq=False)
class BeamGroup(Group):
    """The beams of one search. Every step of a beam is a sequence of its own, which enters with one token left to
    compute and samples nothing that counts: its answer tells of the best tokens. When all have answered, the search
    says which of their continuations are the next members."""

    requests: list[Request | None] = field(default_factory=list)  # who gets the hypotheses, best first; None: has left
    search: BeamSearch = field(kw_only=True)

    def rows(self) -> list[Row] | None:
        """What the members' answers say; None while one is missing."""
        rows = []
        for member in self.members:
            assert member.beam is not None
            words = np.frombuffer(member.beam.record, "<i4")[2:]
            if not len(words):
                return None
            ids, logprobs = words.reshape(2, -1)
            rows.append(Row(member.tokens, member.beam.cumulative_logprob, ids, logprobs.view("<f4")))
        return rows


_DONORS = (Status.DECODING, Status.DRAINING, Status.PARKED)


def listening(group: Group) -> list[Request]:
    """The requests that a search has still to answer."""
    return [request for request in group.requests if request is not None] if isinstance(group, BeamGroup) else []
