"""Which replica takes which waiting request.

A request is bound late: it waits in the one queue, and a replica that plans asks for each request in turn whether it
is the right place. Costs are in tokens to compute: those that the replica's prefix index does not have, the prompts it
has begun and not computed, and a share of what its running sequences hold. Another replica that would be cheaper has
first call on the request, and whoever plans passes over it, but not for longer than taking it would cost more: the
rule of ski rental (Karlin et al., "Competitive snoopy caching", 1988), by which a wait that turns out to be in vain
costs at most twice the best choice. Time is counted in the tokens that the waiting replica plans meanwhile. A replica
that has nothing to do passes over a request only for one that has room for it now.

Tokens of a cached prefix weigh more than others where replicas are compared, for the copy that computing them again
makes takes the place of what others would have found; not where waiting is, or a hot prefix would hold replicas idle.

Estimates only decide where to look: what is really cached, and whether there is room, admission finds out.
"""

from manta.scheduler.replica import HASH_STRIDE, Replica
from manta.scheduler.sequence import Sequence
from manta.scheduler.tenants import TenantMeter
from manta.scheduler.waiting import WaitingQueue

MAX_PASSED = 8  # requests in one plan that others behind them may overtake
_STEP_SHARE = 16  # a step without prompts takes about as long as such a share of its token budget
_CACHED_WEIGHT = 3  # what is computed again also takes blocks, in which others would find their prefix
_HELD_SHARE = 32  # so many tokens that running sequences hold weigh as much as one to compute


class Placement:
    def __init__(self, replicas: list[Replica], queue: WaitingQueue, meter: TenantMeter | None = None) -> None:
        self._replicas = replicas
        self._queue = queue
        self._meter = meter
        self._step_tokens = max(1, min(each.capacity.max_num_batched_tokens for each in replicas) // _STEP_SHARE)
        self._clocks = [0] * len(replicas)  # tokens of work planned
        self._passed: dict[Sequence, None] = {}  # in this plan
        self._loads: list[int] = []  # tokens, by replica, in this plan; with what was left to it
        self._promised: list[tuple[int, int]] = []  # by replica, in this plan: requests left to it, and their blocks
        self.closed: set[int] = set()
        self.idle: set[int] = set()  # replicas that found nothing to run, but requests that are for others

    def choose(self, here: int) -> Sequence | None:
        """The next waiting request that the replica should take. Requests it passes over stay so until `settle`."""
        passed, queue = self._passed, self._queue
        if self._num_others(here) == 0:
            return queue.peek()
        while len(passed) < MAX_PASSED:
            sequence = queue.first(passed)
            if sequence is None or self._is_for(here, sequence):
                return sequence
            passed[sequence] = None
        return None

    def _num_others(self, here: int) -> int:
        """Replicas beside this one that take requests."""
        others = range(len(self._replicas))
        return sum(index != here and index not in self.closed and self._replicas[index].accepts for index in others)

    def settle(self, here: int, num_tokens: int | None) -> None:
        """The replica has planned a step of so many tokens, or None."""
        self.idle.discard(here)
        if num_tokens is not None:
            self._clocks[here] += max(num_tokens, self._step_tokens)
        elif self._passed:  # it is woken by the steps of all others
            self._clocks[here] += max(1, self._step_tokens // len(self._replicas))
            if not self._replicas[here].in_flight:
                self.idle.add(here)
        self._passed = {}
        self._loads = []

    def close(self, replica: int) -> None:
        self.closed.add(replica)
        self.idle.discard(replica)

    def open(self, replica: int) -> None:
        self.closed.discard(replica)

    @property
    def num_passed(self) -> int:
        """Requests that the plan under way has passed over."""
        return len(self._passed)

    def _is_for(self, here: int, sequence: Sequence) -> bool:
        if not self._loads:
            self._loads = [self._load(replica) for replica in self._replicas]
            self._promised = [(0, 0)] * len(self._replicas)
        cached = self._cached(sequence)
        best, saved, has_room = self._best_other(here, sequence, cached)
        if saved <= 0:
            return True
        waited = self._clocks[here] - sequence.passed_at.setdefault(here, self._clocks[here])
        if _CACHED_WEIGHT * waited >= saved:
            return True
        if has_room:
            num_new = len(sequence.tokens) - cached[best]
            num_requests, num_blocks = self._promised[best]
            self._promised[best] = num_requests + 1, num_blocks + self._blocks_for(num_new)
            self._loads[best] += num_new
        return False

    def _best_other(self, here: int, sequence: Sequence, cached: list[int]) -> tuple[int, int, bool]:
        """The replica that saves most beside this one, how many tokens, and whether it has room for the request."""
        picture, loads = self._replicas[here], self._loads
        is_light = self._meter is not None and bool(self._meter.is_light[self._meter.number(sequence.request.tenant)])
        is_idle = not picture.residents and not picture.in_flight
        best, most, best_has_room = -1, 0, False
        for other in range(len(self._replicas)):
            if other == here or other in self.closed or not self._replicas[other].accepts:
                continue
            weight = 1 if is_light else _CACHED_WEIGHT
            saved = weight * (cached[other] - cached[here]) - self._step_tokens  # it plans later
            has_room = self._has_room(other, len(sequence.tokens) - cached[other])
            if is_light:  # it does not queue behind what a replica has, but for what is in flight
                saved -= sum(step.num_tokens for step in self._replicas[other].in_flight)
            elif has_room:
                saved += loads[here] - loads[other]
            elif is_idle:
                continue
            if saved > most:
                best, most, best_has_room = other, saved, has_room
        return best, most, best_has_room

    def _cached(self, sequence: Sequence) -> list[int]:
        """By replica: leading tokens whose KV it has, as far as its index says. Blocks of a prefix are found by
        bisection, as if none in its midst had been evicted: those are evicted last."""
        pooling = sequence.request.pooling
        if (pooling is not None and pooling.needs_all) or sequence.num_scored < sequence.num_to_score:
            return [0] * len(self._replicas)
        block_size, hashes = self._replicas[0].capacity.block_size, sequence.hashes
        counts = [0] * len(self._replicas)
        while True:
            for index, replica in enumerate(self._replicas):
                counts[index] = _num_known(replica.pool.by_hash, hashes, counts[index])
            # As admission does: more is hashed only where all that is hashed was found.
            if max(counts) < len(hashes) or not self._replicas[0].hash_more(sequence, HASH_STRIDE):
                return [count * block_size for count in counts]

    def _load(self, replica: Replica) -> int:
        """Tokens of work before, or beside, a new sequence."""
        begun = sum(
            len(sequence.tokens) - sequence.num_planned
            for lane in replica.lanes
            for sequence in lane.prefilling.values()
        )
        num_held = (replica.capacity.num_blocks - replica.pool.num_free) * replica.capacity.block_size
        return begun + num_held // _HELD_SHARE

    def _has_room(self, index: int, num_new: int) -> bool:
        """Whether the replica could take so many tokens in its next plan, as it looks from here."""
        replica = self._replicas[index]
        num_requests, num_blocks = self._promised[index]
        return (
            len(replica.slots.free) > num_requests
            and not replica.starved
            and replica.pool.num_free - num_blocks >= self._blocks_for(num_new)
        )

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._replicas[0].capacity.block_size)


def _num_known(by_hash: dict[bytes, int], hashes: list[bytes], low: int) -> int:
    """How many leading hashes are known; the first `low` are."""
    high = len(hashes)
    if low < high and hashes[low] not in by_hash:  # most often nothing is known
        return low
    while low < high:
        middle = (low + high) // 2
        if hashes[middle] in by_hash:
            low = middle + 1
        else:
            high = middle
    return low
