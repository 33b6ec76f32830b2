"""Sequences on their way from one replica to another."""

from dataclasses import dataclass, field

from manta.scheduler.sequence import Sequence


@dataclass(slots=True)
class Part:
    """What a move does for one sequence. Its blocks at the source are `Replica.lent`."""

    sequence: Sequence | None  # None: it is elsewhere or has ended, but its blocks are still written to
    blocks: list[int]  # at the target
    num_computed: int  # tokens whose KV they hold when all is copied
    num_cached: int  # leading blocks that the target had already


@dataclass(slots=True, eq=False)
class Move:
    """Copies that somebody has to make, and then to call `Moves.end`. Only the epochs named here are meant."""

    id: int
    source: int
    target: int
    source_epoch: int
    target_epoch: int
    parts: list[Part] = field(default_factory=list)
    copies: dict[int, int] = field(default_factory=dict)  # block of the source -> block of the target

    @property
    def sequences(self) -> list[Sequence]:
        """Those that wait for it."""
        return [part.sequence for part in self.parts if part.sequence is not None]


@dataclass(slots=True)
class Wish:
    """Sequences that are frozen in a replica, to move as soon as nothing of them is in flight."""

    source: int
    sequences: list[Sequence]
    target: int | None = None  # None: wherever it is best
