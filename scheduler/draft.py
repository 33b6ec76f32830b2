"""A step plan while it is being made."""

from dataclasses import dataclass, field

from manta.scheduler.in_flight import InFlightStep, Prefill
from manta.scheduler.lane import Lane
from manta.scheduler.replica import Replica
from manta.scheduler.sequence import Sequence, Status
from manta.scheduler.types import SeqAdd, StepPlan


@dataclass(slots=True)
class Draft:
    replica: Replica
    lane: Lane
    grow: list[tuple[int, int]] = field(default_factory=list)
    filled: dict[int, int] = field(default_factory=dict)  # by slot: full blocks of a row that begins another
    held: list[Sequence] = field(default_factory=list)
    adds: list[SeqAdd] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    prefills: dict[int, Prefill] = field(default_factory=dict)  # by slot, in plan order
    filling: set[int] = field(default_factory=set)  # blocks published by this step, which it still has to write

    @property
    def num_decodes(self) -> int:
        return self.lane.num_decoding - len(self.held)

    @property
    def is_empty(self) -> bool:
        return not self.prefills and not self.num_decodes

    def add_blocks(self, sequences: dict[int, Sequence], blocks: list[int]) -> None:
        """The decode row of each of `sequences`, by slot, begins the next of `blocks`."""
        tables = [sequence.blocks for sequence in sequences.values()]
        self.filled.update(zip(sequences, map(len, tables), strict=True))
        self.grow += zip(sequences, blocks, strict=True)
        for table, block in zip(tables, blocks, strict=True):
            table.append(block)

    def add_prefill(self, sequence: Sequence, num_tokens: int) -> None:
        """The step computes the next `num_tokens` tokens of `sequence`.

        The blocks these fill are published at once: a step writes the KV of all its rows before any row reads, and
        steps run in order, so whoever is planned from now on finds it there.
        """
        start = sequence.num_planned
        sequence.num_planned += num_tokens
        first = sequence.num_published
        self.replica.publish(sequence, sequence.num_planned // self.replica.capacity.block_size)
        self.filling.update(sequence.blocks[first : sequence.num_published])
        is_last = sequence.num_planned == len(sequence.tokens)
        pools = is_last and sequence.request.pooling is not None
        self.prefills[sequence.slot] = Prefill(sequence, start, num_tokens, is_last and not pools, pools)

    def hold_frozen(self) -> None:
        """Those of the lane that are about to move sit out the step."""
        frozen = self.replica.frozen.values()
        self.held += [each for each in frozen if each.lane == self.lane.index and each.status is Status.DECODING]

    def commit(self) -> StepPlan:
        """The plan is final: the picture moves on to the state after it."""
        replica, lane = self.replica, self.lane
        rows = lane.rows_without(self.held) if self.held else lane.rows()
        clock = lane.clock
        for sequence in self.held:
            lane.hold(sequence)
        ending = lane.tick()
        for slot, prefill in self.prefills.items():
            if prefill.samples:
                length = len(prefill.sequence.tokens) + 1
                if length < prefill.sequence.max_length:
                    lane.start_decoding(prefill.sequence, length)
                else:
                    lane.drain(prefill.sequence)
                    ending[slot] = prefill.sequence
            elif prefill.pools:
                lane.drain(prefill.sequence)
                ending[slot] = prefill.sequence
        replica.step += 1
        replica.in_flight.append(InFlightStep(replica.step, lane, clock, rows, self.prefills, self.filled, ending))
        replica.next_lane = (lane.index + 1) % len(replica.lanes)
        frees, replica.frees = replica.frees, []
        return StepPlan(
            epoch=replica.epoch,
            step=replica.step,
            lane=lane.index,
            frees=frees,
            adds=self.adds,
            grow=self.grow,
            copies=self.copies,
            holds=[sequence.slot for sequence in self.held],
            prefill=[(slot, prefill.num_tokens) for slot, prefill in self.prefills.items()],
            num_decodes=len(rows),
            num_tokens=len(rows) + sum(prefill.num_tokens for prefill in self.prefills.values()),
        )
