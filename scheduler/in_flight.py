"""A plan that is sent and not answered: what `apply` needs to know to read the answer."""

from dataclasses import dataclass, field

import numpy as np

from manta.scheduler.lane import Lane, Rows
from manta.scheduler.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Prefill:
    sequence: Sequence
    start: int  # tokens computed before
    num_tokens: int
    samples: bool  # it reaches the sequence's last known token
    pools: bool = False  # it does, and the sequence gets its vector instead of a token


@dataclass(slots=True)
class InFlightStep:
    """A slot is not taken again while a step that it is part of is in flight, so a slot number names one stay of one
    sequence in the replica. What a sequence that has left gets from such a step is dropped."""

    step: int
    lane: Lane
    clock: int  # the lane's, when this was planned
    rows: Rows
    prefills: dict[int, Prefill]  # by slot, in plan order
    filled: dict[int, int]  # by slot of a decode row that began a block: the number of full blocks before it
    ending: dict[int, Sequence]  # by slot: the step's token is the last that fits
    left: set[int] = field(default_factory=set)  # slots given up since

    @property
    def num_tokens(self) -> int:
        return len(self.rows) + sum(prefill.num_tokens for prefill in self.prefills.values())

    @property
    def num_sampled(self) -> int:
        return len(self.rows) + sum(prefill.samples for prefill in self.prefills.values())

    def samples(self, slot: int) -> bool:
        """Whether the step gives the slot a token."""
        prefill = self.prefills.get(slot)
        if prefill is not None:
            return prefill.samples
        index = int(np.searchsorted(self.rows.slots, slot))
        return index < len(self.rows) and int(self.rows.slots[index]) == slot

    def drop(self, slot: int) -> None:
        """The sequence in `slot` has left the replica."""
        self.left.add(slot)
        self.filled.pop(slot, None)
        self.ending.pop(slot, None)
