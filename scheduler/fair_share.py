"""How tenants share the slots and the prompt tokens of a step under the "fair" policy.

The queue gives each its share of service in the long run. For a tenant that asks for little that is not enough: its
request would wait for a slot of those whose queue is long, and behind the rest of their prompts. So the last slots are
for tenants that have nothing running, and prompts of tenants with less running are computed first, but for a part of
the budget, which keeps those of the others moving.
"""

from manta.scheduler.fair_queue import FairQueue
from manta.scheduler.replica import Replica
from manta.scheduler.sequence import Sequence
from manta.scheduler.tenants import TenantMeter

_KEPT_SLOTS_SHARE = 32  # such a part of the slots is for tenants that have nothing running
_KEPT_SHARE = 4  # such a part of the budget goes to prompts of other tenants, if these have begun any


class FairShare:
    def __init__(self, replica: Replica, queue: FairQueue, meter: TenantMeter) -> None:
        self._replica = replica
        self._queue = queue
        self._meter = meter
        self._num_kept = replica.capacity.max_num_seqs // _KEPT_SLOTS_SHARE

    def look(self) -> None:
        """Before a sequence is chosen: may it be anyone's?"""
        has_others = len(self._meter.service) > 1
        self._queue.is_tight = has_others and len(self._replica.slots.free) <= self._num_kept

    def goes_ahead(self, prefilling: list[Sequence]) -> bool:
        """Whether the next in the queue comes before prompts that are under way: its tenant has less running."""
        self.look()
        head = self._queue.peek()
        if head is None:
            return False
        tenants = {sequence.request.tenant for sequence in prefilling}
        if head.request.tenant in tenants:
            return False
        return self._meter.usage(head.request.tenant) < min(map(self._meter.usage, tenants))

    @staticmethod
    def first_part(budget: int) -> int:
        """What one who goes ahead may take."""
        return budget - _kept(budget)

    def split(self, prefilling: list[Sequence], budget: int) -> list[tuple[Sequence, int]]:
        """How many tokens of which prompt are next, `budget` in all at most."""
        by_tenant: dict[str, list[Sequence]] = {}
        for sequence in prefilling:
            by_tenant.setdefault(sequence.request.tenant, []).append(sequence)
        first = min(by_tenant, key=self._meter.usage)
        ordered = by_tenant.pop(first)
        others = [sequence for sequences in by_tenant.values() for sequence in sequences]
        needed = sum(_num_left(sequence) for sequence in others)
        kept = min(needed, _kept(budget))
        parts: list[tuple[Sequence, int]] = []
        left = budget
        for sequence in ordered:
            num_tokens = min(left - kept, _num_left(sequence))
            parts.append((sequence, num_tokens))
            left -= num_tokens
        for sequence in others:
            num_tokens = min(left, _num_left(sequence))
            parts.append((sequence, num_tokens))
            left -= num_tokens
        return [(sequence, num_tokens) for sequence, num_tokens in parts if num_tokens > 0]


def _kept(budget: int) -> int:
    return max(1, budget // _KEPT_SHARE)


def _num_left(sequence: Sequence) -> int:
    return len(sequence.tokens) - sequence.num_planned
