"""Gives decoding sequences the blocks they need, at the cost of those admitted last.

Whoever needs a block gets a free one; where blocks are only in limbo, or those of sequences that are moving to another
replica, it sits out a step and is served before anyone behind it; where even that does not help, the last admitted (or
least important) sequence loses its place. The first in rank is never preempted for another, and the pool holds it
whole: so it always ends, and so does everybody.
"""

from collections.abc import Callable

from manta.scheduler.draft import Draft
from manta.scheduler.replica import Replica
from manta.scheduler.sequence import Sequence

Preempt = Callable[[Sequence], None]


def give_blocks(draft: Draft, preempt: Preempt) -> None:
    """Fills in who of the draft's lane gets a block and who is held back."""
    replica = draft.replica
    growing = _growing(draft)
    if not growing:
        return
    if replica.starved or len(growing) > replica.pool.num_free:
        _give_by_rank(draft, preempt)
    else:
        draft.add_blocks(growing, replica.pool.take(len(growing)))
    if draft.filled:
        replica.slots.widen((max(draft.filled.values()) + 1) * replica.capacity.block_size + 1)


def _give_by_rank(draft: Draft, preempt: Preempt) -> None:
    replica, pool = draft.replica, draft.replica.pool
    for sequence in sorted(_growing(draft).values(), key=lambda sequence: sequence.rank):
        while sequence.replica == replica.index:  # until it is served or preempted itself
            num_owed = sum(other.rank < sequence.rank for other in replica.starved.values())
            if pool.num_free > num_owed:
                replica.starved.pop(sequence.slot, None)
                draft.add_blocks({sequence.slot: sequence}, pool.take(1))
                break
            if pool.num_free + pool.num_limbo + _num_leaving(replica) > num_owed:
                replica.starved[sequence.slot] = sequence
                draft.held.append(sequence)
                break
            preempt(last_in_rank(replica))


def _growing(draft: Draft) -> dict[int, Sequence]:
    """By slot, who computes the first token of a new block in this step."""
    growing, frozen = draft.lane.growing(), draft.replica.frozen
    if not frozen:
        return growing
    return {slot: sequence for slot, sequence in growing.items() if slot not in frozen}


def _num_leaving(replica: Replica) -> int:
    """Blocks that are given back when those have gone that are moving away."""
    refs = replica.pool.refs
    tables = [sequence.blocks for sequence in replica.frozen.values()] + list(replica.lent.values())
    return sum(refs[block] == 1 for table in tables for block in table)


def last_in_rank(replica: Replica) -> Sequence:
    return max([*replica.residents.values(), *replica.parked], key=lambda sequence: sequence.rank)
