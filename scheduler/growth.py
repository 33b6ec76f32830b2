"""Gives decoding sequences the blocks they need, at the cost of those admitted last.

Whoever needs a block gets a free one; where blocks are only in limbo it sits out a step and is served before anyone
behind it; where even that does not help, the last admitted (or least important) sequence loses its place. The first
in rank is never preempted for another, and the pool holds it whole: so it always ends, and so does everybody.
"""

from collections.abc import Callable

from manta.scheduler.draft import Draft
from manta.scheduler.replica import Replica
from manta.scheduler.sequence import Sequence

Preempt = Callable[[Sequence], None]


def give_blocks(draft: Draft, preempt: Preempt) -> None:
    """Fills in who of the draft's lane gets a block and who is held back."""
    replica = draft.replica
    growing = draft.lane.growing()
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
    for sequence in sorted(draft.lane.growing().values(), key=lambda sequence: sequence.rank):
        while sequence.replica == replica.index:  # until it is served or preempted itself
            num_owed = sum(other.rank < sequence.rank for other in replica.starved.values())
            if pool.num_free > num_owed:
                replica.starved.pop(sequence.slot, None)
                draft.add_blocks({sequence.slot: sequence}, pool.take(1))
                break
            if pool.num_free + pool.num_limbo > num_owed:
                replica.starved[sequence.slot] = sequence
                draft.held.append(sequence)
                break
            preempt(last_in_rank(replica))


def last_in_rank(replica: Replica) -> Sequence:
    return max([*replica.residents.values(), *replica.parked], key=lambda sequence: sequence.rank)
