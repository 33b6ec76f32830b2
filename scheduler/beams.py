"""Beams of a search on their way through a replica: their answers, and what follows from them."""

import numpy as np

from manta.scheduler.beam_search import Row
from manta.scheduler.group import BeamGroup
from manta.scheduler.replica import Replica
from manta.scheduler.sequence import Beam, Sequence, Status
from manta.scheduler.types import Events, Finished


def take_answers(replica: Replica, beams: list[Sequence], events: Events) -> None:
    """A step of these beams is answered. Where no other of their search is awaited, the next beams follow, or the
    search ends."""
    for sequence in beams:
        replica.park(sequence)
    for group in dict.fromkeys(sequence.group for sequence in beams):
        assert isinstance(group, BeamGroup)
        rows = group.rows()
        if rows is not None:
            _go_on(replica, group, rows, events)


def _go_on(replica: Replica, group: BeamGroup, rows: list[Row], events: Events) -> None:
    parents = group.members
    group.members = [
        _child(replica, parents[each.parent], each.token, each.cumulative_logprob)
        for each in group.search.advance(rows)
    ]
    for parent in parents:
        if parent.status is Status.PARKED:
            replica.unpark(parent, Status.FINISHED)
    replica.followers += group.members
    if group.search.is_over:
        _tell(group, events)


def _child(replica: Replica, parent: Sequence, token: int, cumulative_logprob: float) -> Sequence:
    """The beam that goes on from `parent` with `token`. It holds the same blocks, if the parent still has its own."""
    tokens = np.append(parent.tokens, np.int32(token))
    child = Sequence(parent.request, parent.arrival, len(tokens) + 1, tokens, parent.root)
    child.started = True
    child.num_scored = parent.num_scored
    child.group, child.beam = parent.group, Beam(cumulative_logprob)
    child.rank = parent.rank
    child.hashes = parent.hashes.copy()
    if parent.status is Status.PARKED:
        child.status = Status.PARKED
        child.replica = replica.index
        child.blocks = replica.pool.fork(parent.blocks)
        child.num_planned = child.num_computed = len(parent.tokens)
        child.num_published = parent.num_published
        replica.parked[child] = None
    return child


def _tell(group: BeamGroup, events: Events) -> None:
    """Everyone who still listens gets its hypothesis, all tokens at once."""
    for request, hypothesis in zip(group.requests, group.search.hypotheses, strict=False):
        if request is None:
            continue
        num_tokens, ended = len(hypothesis.tokens), hypothesis.end_token is not None
        events.request_ids = np.append(events.request_ids, np.full(num_tokens, request.id))
        events.tokens = np.append(events.tokens, hypothesis.tokens)
        events.finished.append(
            Finished(
                request,
                "stop" if ended else "length",
                hypothesis.end_token,
                num_tokens,
                hypothesis.cumulative_logprob,
            )
        )
