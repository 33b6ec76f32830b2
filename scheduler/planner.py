"""Makes the next step plan of one replica.

There is no prefill phase and no decode phase. A step holds, within max_num_batched_tokens and in this order: one token
of everyone in the lane who decodes, the next chunks of prompts already begun, and first chunks of new sequences.
"""

from manta.scheduler.admission import Admission
from manta.scheduler.draft import Draft
from manta.scheduler.growth import give_blocks
from manta.scheduler.replica import Replica
from manta.scheduler.sequence import Sequence, Status
from manta.scheduler.types import Counters, Events, Started, StepPlan
from manta.scheduler.waiting import WaitingQueue


class Planner:
    def __init__(
        self, replica: Replica, queue: WaitingQueue, counters: Counters, events: Events, enable_chunked_prefill: bool
    ) -> None:
        self._replica = replica
        self._queue = queue
        self._counters = counters
        self._events = events
        self._admission = Admission(replica, enable_chunked_prefill)

    def plan(self) -> StepPlan | None:
        """The next step; None if there is nothing to run now or enough plans are unanswered. Lanes take turns;
        those without work are passed over."""
        replica = self._replica
        if len(replica.in_flight) >= replica.capacity.max_in_flight:
            return None
        for turn in range(len(replica.lanes)):
            draft = Draft(replica, replica.lanes[(replica.next_lane + turn) % len(replica.lanes)])
            give_blocks(draft, self._preempt)
            budget = replica.capacity.max_num_batched_tokens - draft.num_decodes
            if draft.lane.prefilling:
                budget -= self._continue_prefills(draft, budget)
            if self._queue:
                self._admit(draft, budget)
            if not draft.is_empty:
                return draft.commit()
        return None

    @staticmethod
    def _continue_prefills(draft: Draft, budget: int) -> int:
        """Returns how much of the budget they take."""
        left = budget
        for sequence in draft.lane.prefilling.values():
            if not left:
                break
            num_tokens = min(left, len(sequence.tokens) - sequence.num_planned)
            draft.add_prefill(sequence, num_tokens)
            left -= num_tokens
        return budget - left

    def _admit(self, draft: Draft, budget: int) -> None:
        while budget > 0 and self._admission.has_room(draft, len(self._queue)):
            sequence = self._queue.peek()
            if sequence is None:
                return
            num_cached = self._admission.admit(sequence, draft, budget)
            if num_cached < 0:
                return
            self._queue.remove(sequence)
            budget -= draft.prefills[sequence.slot].num_tokens
            if not sequence.started:
                sequence.started = True
                self._events.started.append(Started(sequence.request, num_cached))
                if self._replica.enable_prefix_caching:
                    self._counters.num_prefix_queries += len(sequence.tokens)
                    self._counters.num_prefix_hits += num_cached

    def _preempt(self, sequence: Sequence) -> None:
        self._replica.leave(sequence, Status.WAITING)
        self._queue.push_front(sequence)
        self._counters.num_preemptions += 1
