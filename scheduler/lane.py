"""Decoding sequences of one lane in plan time.

A lane's clock counts its planned steps. A decoding sequence grows by one token per tick, so its length is
`offset + clock` and nothing has to be written per step. For the same reason the tick at which it needs its next block
and the tick of its last token are known when it starts to decode: both are calendars, and a step looks only at today.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manta.scheduler.sequence import Sequence, Status


@dataclass(frozen=True, slots=True)
class Rows:
    """The decode rows of a step, by ascending slot. Shared between steps: nobody writes to it."""

    slots: NDArray[np.int64]
    offsets: NDArray[np.int64]  # + the step's tick: tokens before the step
    request_ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.slots)

    def select(self, kept: NDArray[np.bool_]) -> "Rows":
        return Rows(self.slots[kept], self.offsets[kept], self.request_ids[kept])

    def indices(self, slots: set[int]) -> NDArray[np.int64]:
        """Rows of those `slots` that have one."""
        if not len(self):
            return np.empty(0, np.int64)
        wanted = np.fromiter(slots, np.int64, len(slots))
        found: NDArray[np.int64] = np.minimum(np.searchsorted(self.slots, wanted), len(self) - 1)
        matching: NDArray[np.int64] = found[self.slots[found] == wanted]
        return matching


class Lane:
    def __init__(self, index: int, block_size: int, max_num_seqs: int) -> None:
        self.index = index
        self.clock = 0
        self.num_residents = 0  # sequences that joined, in whatever status
        self.prefilling: dict[int, Sequence] = {}  # by slot, in order of admission
        self.decoding = np.zeros(max_num_seqs, np.bool_)
        self.num_decoding = 0
        self.offsets = np.zeros(max_num_seqs, np.int64)
        self._request_ids = np.zeros(max_num_seqs, np.int64)
        self._block_size = block_size
        self.growth: list[dict[int, Sequence]] = [{} for _ in range(block_size)]  # tick % block_size -> by slot
        self.endings: dict[int, dict[int, Sequence]] = {}  # tick -> by slot: the tick of the last token
        self._rows: Rows | None = None

    def join(self, sequence: Sequence) -> None:
        sequence.lane = self.index
        self.num_residents += 1
        self.prefilling[sequence.slot] = sequence

    def leave(self, sequence: Sequence) -> None:
        self.num_residents -= 1
        self.prefilling.pop(sequence.slot, None)
        if sequence.status is Status.DECODING:
            self._stop(sequence)

    def start_decoding(self, sequence: Sequence, length: int) -> None:
        """Its prefill is planned; it has `length` tokens at the next tick, fewer than its limit."""
        slot = sequence.slot
        del self.prefilling[slot]
        sequence.status = Status.DECODING
        self.decoding[slot] = True
        self.num_decoding += 1
        self._request_ids[slot] = sequence.request.id
        self._schedule(sequence, length - self.clock)

    def drain(self, sequence: Sequence) -> None:
        """Its last token is planned."""
        if sequence.status is Status.DECODING:
            self._stop(sequence)
        else:
            del self.prefilling[sequence.slot]
        sequence.status = Status.DRAINING

    def length(self, slot: int) -> int:
        """Tokens of a decoding sequence, planned ones included."""
        return int(self.offsets[slot]) + self.clock

    def growing(self) -> dict[int, Sequence]:
        """By slot, who computes the first token of a new block at this tick. The lane's own: not to be changed."""
        return self.growth[self.clock % self._block_size]

    def rows(self) -> Rows:
        """Everyone who decodes at this tick."""
        if self._rows is None:
            self._rows = self._select(self.decoding)
        return self._rows

    def rows_without(self, held: list[Sequence]) -> Rows:
        running = self.decoding.copy()
        running[[sequence.slot for sequence in held]] = False
        return self._select(running)

    def hold(self, sequence: Sequence) -> None:
        """It sits out this tick: everything about it is due one tick later."""
        offset = int(self.offsets[sequence.slot])
        self._unschedule(sequence)
        self._schedule(sequence, offset - 1)

    def tick(self) -> dict[int, Sequence]:
        """The step is planned; returns by slot whose last token it was. They decode no longer."""
        ending = self.endings.pop(self.clock, {})
        for sequence in ending.values():
            self.drain(sequence)
        self.clock += 1
        return ending

    def _select(self, running: NDArray[np.bool_]) -> Rows:
        slots = np.flatnonzero(running)
        return Rows(slots, self.offsets[slots], self._request_ids[slots])

    def _stop(self, sequence: Sequence) -> None:
        self._unschedule(sequence)
        self.decoding[sequence.slot] = False
        self.num_decoding -= 1

    def _schedule(self, sequence: Sequence, offset: int) -> None:
        slot = sequence.slot
        self.offsets[slot] = offset
        self.growth[self.growth_phase(offset)][slot] = sequence
        self.endings.setdefault(self.last_tick(sequence, offset), {})[slot] = sequence
        self._rows = None

    def _unschedule(self, sequence: Sequence) -> None:
        slot = sequence.slot
        offset = int(self.offsets[slot])
        del self.growth[self.growth_phase(offset)][slot]
        last_tick = self.last_tick(sequence, offset)
        ending = self.endings.get(last_tick)
        if ending is not None:  # None in tick(), which has taken the whole day off the calendar
            del ending[slot]
            if not ending:
                del self.endings[last_tick]
        self._rows = None

    def growth_phase(self, offset: int) -> int:
        """At tick t it computes position offset + t - 1, which begins a block when that is a multiple of the size."""
        return (1 - offset) % self._block_size

    @staticmethod
    def last_tick(sequence: Sequence, offset: int) -> int:
        """The tick that takes it from max_length - 1 tokens to max_length."""
        return sequence.max_length - 1 - offset
