"""When sequences should leave a replica that serves for another one.

Pressure: the pool will soon be full. Whoever came in last would be preempted, its blocks lost; instead it moves to
where there is room. Imbalance: one replica is loaded, another stands nearly idle, and nobody waits who could go there.

Nothing goes to and fro: the target has to have room for much more than what would drive sequences out of it again, the
loads must be far apart and are only brought together, never crossed, it takes two looks in a row to see an imbalance,
and a sequence that has moved stays until it has grown for a while.
"""

from manta.scheduler.replica import Replica
from manta.scheduler.room import is_movable, spare_blocks
from manta.scheduler.sequence import Sequence

PRESSED_BLOCKS = 2  # blocks left for each decoding sequence: below, some have to go
ROOMY_BLOCKS = 4  # blocks left for each at the target, those that come included
LOADED = 0.5  # share of slots or blocks in use
FAR_APART = 4  # a target has at most such a part of the load
MIN_LEFT = 32  # tokens that a sequence may still get: below, moving it for balance is not worth it
MIN_STAY = 128  # tokens between two moves of a sequence
_LOOK_EVERY = 16  # steps between looks for an imbalance


class Rebalancer:
    def __init__(self, replicas: list[Replica], closed: set[int], max_together: int) -> None:
        self._replicas = replicas
        self._closed = closed
        self._max_together = max_together
        self._num_steps = 0
        self._seen: tuple[int, int] | None = None  # source and target of the last look, where loads were far apart

    def look(self, source: int, *, has_queue: bool) -> tuple[int | None, list[Sequence]]:
        """Who should leave `source`, of which a step has been answered, and for which replica."""
        replica = self._replicas[source]
        self._num_steps += 1
        if is_pressed(replica):
            return self._relieve(replica)
        if has_queue or self._num_steps % _LOOK_EVERY:
            return None, []
        return self._even_out(replica)

    def _relieve(self, replica: Replica) -> tuple[int | None, list[Sequence]]:
        """Those that would be preempted first, until the others have enough."""
        missing = PRESSED_BLOCKS * _num_decoding(replica) - _num_coming(replica)
        target = max(self._others(replica), key=spare_blocks, default=None)
        if target is None:
            return None, []
        chosen: list[Sequence] = []
        room = spare_blocks(target) - ROOMY_BLOCKS * _num_decoding(target)
        for sequence in sorted(replica.residents.values(), key=lambda each: each.rank, reverse=True):
            room -= len(sequence.blocks) + ROOMY_BLOCKS
            if missing <= 0 or room < 0 or len(chosen) >= min(self._max_together, _num_slots(target)):
                break
            is_last = len(chosen) + 1 == len(replica.residents)
            if not is_last and self._may_go(replica, sequence, replica.capacity.block_size):
                chosen.append(sequence)
                missing -= len(sequence.blocks)
        return target.index, chosen

    def _even_out(self, replica: Replica) -> tuple[int | None, list[Sequence]]:
        target = min(self._others(replica), key=load, default=None)
        if target is None or load(replica) < LOADED or load(target) * FAR_APART > load(replica):
            self._seen = None
            return None, []
        pair = (replica.index, target.index)
        if self._seen != pair:
            self._seen = pair
            return None, []
        num_wanted = min((_num_running(replica) - _num_running(target)) // 2, self._max_together, _num_slots(target))
        candidates = [each for each in replica.residents.values() if self._may_go(replica, each, MIN_LEFT)]
        candidates.sort(key=lambda each: len(each.blocks))  # the cheapest first
        chosen: list[Sequence] = []
        room = spare_blocks(target) - ROOMY_BLOCKS * _num_decoding(target)
        for sequence in candidates[: max(num_wanted, 0)]:
            room -= len(sequence.blocks) + ROOMY_BLOCKS
            if room < 0:
                break
            chosen.append(sequence)
        return target.index, chosen

    def _others(self, replica: Replica) -> list[Replica]:
        return [
            other
            for other in self._replicas
            if other is not replica and other.index not in self._closed and other.accepts and not is_pressed(other)
        ]

    def _may_go(self, replica: Replica, sequence: Sequence, min_left: int) -> bool:
        num_tokens = replica.num_tokens(sequence)
        has_stayed = sequence.moved_at < 0 or num_tokens >= sequence.moved_at + MIN_STAY
        return has_stayed and sequence.max_length - num_tokens >= min_left and is_movable(self._replicas, sequence)


def is_pressed(replica: Replica) -> bool:
    """Whether somebody will be preempted soon, unless others end or go. One alone always fits."""
    num_decoding = _num_decoding(replica)
    return num_decoding > 1 and _num_coming(replica) < PRESSED_BLOCKS * num_decoding


def load(replica: Replica) -> float:
    """The share of slots or of blocks that is in use, whichever is larger."""
    capacity = replica.capacity
    return max(_num_running(replica) / capacity.max_num_seqs, 1 - replica.pool.num_free / capacity.num_blocks)


def _num_decoding(replica: Replica) -> int:
    return sum(lane.num_decoding for lane in replica.lanes)


def _num_coming(replica: Replica) -> int:
    """Blocks that can be given out now or soon."""
    return replica.pool.num_free + replica.pool.num_limbo


def _num_running(replica: Replica) -> int:
    return len(replica.residents) + len(replica.followers) + replica.num_expected


def _num_slots(replica: Replica) -> int:
    return len(replica.slots.free) - replica.num_expected - len(replica.followers)
