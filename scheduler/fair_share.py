"""How tenants share the slots, the blocks and the prompt tokens of a step under the "fair" policy.

The queue gives each its share of service in the long run. For a tenant that asks for little that is not enough: its
request would wait for the steps that are planned, for a slot of those whose queue is long, and behind the rest of their
prompts. While a light tenant (tenants.py) is there, therefore

    its prompts come first in a step, as much as the step holds, and no others beside them beyond the step's target;
    a step of others is somewhat shorter than computing a prompt of the light one, the target, and the next one
    is planned when it is answered: what is sent cannot be taken back;
    the last blocks are for light tenants, as the last slots are at all times, and if blocks are gone, who was admitted
    last gives up its place.

Among tenants that are not light, prompts of those with less running are computed first, but for a part of the budget,
which keeps those of the others moving.
"""

from manta.scheduler.admission import blocks_for
from manta.scheduler.draft import Draft
from manta.scheduler.fair_queue import FairQueue
from manta.scheduler.replica import Replica
from manta.scheduler.sequence import Sequence
from manta.scheduler.tenants import TenantMeter

_KEPT_SHARE = 4  # such a part of the budget goes to prompts of other tenants, if these have begun any
_KEPT_ROOM_SHARE = 32  # such a part of slots and blocks is for light tenants
_MAX_ROOM_SHARE = 8  # and at most such a part, however few there are; more is not taken from others
_TARGET_SHARE = 0.7  # of a light tenant's prompt: so long is a step of others
_MIN_TARGET = 256  # tokens, or such a part of the budget: shorter steps would mostly be what a step costs anyway
_MIN_TARGET_SHARE = 8


class FairShare:
    def __init__(self, replica: Replica, queue: FairQueue, meter: TenantMeter, is_chunked: bool) -> None:
        """is_chunked: prompts may be computed in parts."""
        self._replica = replica
        self._queue = queue
        self._meter = meter
        self._is_chunked = is_chunked
        self._num_kept_slots = 0
        self._num_kept_blocks = 0
        self._target: int | None = None  # tokens of a step; None while no light tenant is there

    def begin(self) -> None:
        """A plan begins: who is light, and is anybody?"""
        meter, capacity = self._meter, self._replica.capacity
        meter.classify()
        self._num_kept_slots = _part(capacity.max_num_seqs, 1) if len(meter.service) > 1 else 0
        if meter.light_prompt is None:
            self._target, self._num_kept_blocks = None, 0
            return
        least = min(capacity.max_num_batched_tokens // _MIN_TARGET_SHARE, _MIN_TARGET)
        target = max(int(meter.light_prompt * _TARGET_SHARE), least)
        self._target = min(target, capacity.max_num_batched_tokens)
        self._num_kept_blocks = _part(capacity.num_blocks, blocks_for(2 * int(meter.light_prompt), capacity.block_size))

    def waits(self) -> bool:
        """Whether the next step is planned later: those in flight are long enough."""
        replica = self._replica
        if self._target is None or len(replica.in_flight) < replica.capacity.num_lanes:
            return False
        return self._num_in_flight() + replica.lanes[replica.next_lane].num_decoding > self._target

    def room(self, draft: Draft, budget: int) -> int:
        """How much of the budget prompts of tenants that are not light may take."""
        if self._target is None or not self._is_chunked:
            return budget
        num_light = sum(prefill.num_tokens for prefill in draft.prefills.values())
        is_alone = not num_light and not self._num_in_flight()
        least = max(self._target // _KEPT_SHARE, draft.num_decodes)  # less would mostly be what decoding costs
        room = self._target - self._num_in_flight() - draft.num_decodes - num_light
        return min(budget, max(room, least if is_alone else 0))

    def _num_in_flight(self) -> int:
        """Tokens that the next step of a lane waits for."""
        replica = self._replica
        if len(replica.in_flight) < replica.capacity.num_lanes:
            return 0
        return sum(step.num_tokens for step in replica.in_flight) // replica.capacity.num_lanes

    def is_light(self, sequence: Sequence) -> bool:
        return self._target is not None and bool(self._meter.is_light[self._meter.number(sequence.request.tenant)])

    def light_next(self) -> Sequence | None:
        """The first that waits, if it is a light tenant's."""
        head = self._queue.peek() if self._target is not None else None
        return head if head is not None and self.is_light(head) else None

    def look(self) -> None:
        """Before a sequence is chosen: may it be anyone's?"""
        self._queue.is_tight = len(self._replica.slots.free) <= self._num_kept_slots

    def num_kept_blocks(self, sequence: Sequence) -> int:
        """Blocks that must be left when it is admitted."""
        return 0 if self.is_light(sequence) else self._num_kept_blocks

    def num_lacking(self) -> int:
        """Blocks that a light tenant's sequence waits for, which others should give up."""
        sequence, pool = self.light_next(), self._replica.pool
        if sequence is None or not self._replica.slots.free:
            return 0
        num_blocks = blocks_for(len(sequence.tokens), self._replica.capacity.block_size)
        num_free = pool.num_free + pool.num_limbo - pool.num_blocks // 100 - 1
        if num_blocks <= num_free or num_blocks > pool.num_blocks // _MAX_ROOM_SHARE:
            return 0
        hits = self._replica.find_prefix(sequence)
        return max(0, num_blocks - len(hits) - (num_free - pool.num_unreferenced(hits)))

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
        kept = min(needed, _kept(budget), budget)
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


def _part(count: int, least: int) -> int:
    return max(count // _KEPT_ROOM_SHARE, min(least, count // _MAX_ROOM_SHARE))


def _kept(budget: int) -> int:
    return max(1, budget // _KEPT_SHARE)


def _num_left(sequence: Sequence) -> int:
    return len(sequence.tokens) - sequence.num_planned
