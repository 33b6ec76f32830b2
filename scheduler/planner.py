"""Makes the next step plan of one replica.

There is no prefill phase and no decode phase. A step holds, within max_num_batched_tokens and in this order: one token
of everyone in the lane who decodes, the next chunks of prompts already begun, and first chunks of new sequences.
"""

import sys

from manta.scheduler.admission import Admission
from manta.scheduler.draft import Draft
from manta.scheduler.fair_queue import FairQueue
from manta.scheduler.fair_share import FairShare
from manta.scheduler.group import BeamGroup, listening
from manta.scheduler.growth import give_blocks, last_in_rank
from manta.scheduler.placement import Placement
from manta.scheduler.replica import Replica
from manta.scheduler.sequence import Sequence, Status
from manta.scheduler.trials import Trials
from manta.scheduler.types import Counters, Events, Started, StepPlan
from manta.scheduler.waiting import WaitingQueue


class Planner:
    def __init__(
        self,
        replica: Replica,
        queue: WaitingQueue,
        placement: Placement | None,
        trials: Trials,
        counters: Counters,
        events: Events,
        enable_chunked_prefill: bool,
    ) -> None:
        """placement: None where there is but one replica."""
        self._replica = replica
        self._queue = queue
        self._placement = placement
        self._trials = trials
        self._counters = counters
        self._events = events
        self._admission = Admission(replica, enable_chunked_prefill)
        self._fair_share: FairShare | None = None
        if isinstance(queue, FairQueue) and replica.meter is not None:
            self._fair_share = FairShare(replica, queue, replica.meter, enable_chunked_prefill)

    def plan(self) -> StepPlan | None:
        """The next step; None if there is nothing to run now or enough plans are unanswered. Lanes take turns;
        those without work are passed over."""
        replica = self._replica
        if len(replica.in_flight) >= replica.capacity.max_in_flight:
            return None
        if self._fair_share is not None and self._waits_for_light(self._fair_share):
            return None
        plan = self._plan_step()
        while plan is None and replica.parked and self._is_stuck():
            # Beams that wait hold what others, or they themselves, need: nobody else will make room.
            self._preempt(last_in_rank(replica))
            plan = self._plan_step()
        if self._placement is not None:
            self._placement.settle(replica.index, None if plan is None else plan.num_tokens)
        return plan

    def _is_stuck(self) -> bool:
        """Nothing runs, nobody is about to leave, and somebody waits."""
        replica = self._replica
        return not (replica.in_flight or replica.frozen) and bool(replica.followers or self._queue)

    def _plan_step(self) -> StepPlan | None:
        replica = self._replica
        for turn in range(len(replica.lanes)):
            draft = Draft(replica, replica.lanes[(replica.next_lane + turn) % len(replica.lanes)])
            give_blocks(draft, self._preempt)
            if replica.frozen:
                draft.hold_frozen()
            budget = replica.capacity.max_num_batched_tokens - draft.num_decodes
            has_room = True
            if replica.followers:
                num_tokens, has_room = self._admit_followers(draft, budget)
                budget -= num_tokens
            if self._fair_share is not None:
                budget = self._plan_light(self._fair_share, draft, budget, has_room)
            if draft.lane.prefilling:
                if self._fair_share is not None and self._queue and has_room:
                    budget -= self._admit_ahead(self._fair_share, draft, budget)
                budget -= self._continue_prefills(draft, budget)
            if self._trials.waiting and has_room:
                budget -= self._admit_suspect(draft, budget)
            if self._queue and has_room:
                self._admit(draft, budget)
            if not draft.is_empty:
                plan = draft.commit()
                self._call_pending(draft)
                return plan
        return None

    def _waits_for_light(self, fair_share: FairShare) -> bool:
        """A plan begins. Whether it is better made later, so that the next of a light tenant does not wait for it. If
        one waits for blocks already, others give them up."""
        replica = self._replica
        fair_share.begin()
        if fair_share.waits():
            return True
        if not replica.accepts or self._trials.is_under_way(replica.index):
            return False  # nobody enters
        # Blocks may be lacking that nobody here could give up: those of moves under way.
        while (replica.residents or replica.parked) and fair_share.num_lacking():
            last = last_in_rank(replica)
            if not last.rank[0]:
                break
            self._preempt(last)
        return False

    def _plan_light(self, fair_share: FairShare, draft: Draft, budget: int, has_room: bool) -> int:
        """Prompts of light tenants. Returns how much of the budget others may take."""
        left = budget
        for sequence in filter(fair_share.is_light, list(draft.lane.prefilling.values())):
            num_tokens = min(left, len(sequence.tokens) - sequence.num_planned)
            if num_tokens and sequence.slot not in draft.prefills and sequence.slot not in self._replica.frozen:
                draft.add_prefill(sequence, num_tokens)
                left -= num_tokens
        while has_room and left > 0 and fair_share.light_next() is not None:
            num_tokens = self._admit(draft, left, max_num_seqs=1, only_light=True)
            if not num_tokens:
                break
            left -= num_tokens
        return fair_share.room(draft, left)

    def _admit_ahead(self, fair_share: FairShare, draft: Draft, budget: int) -> int:
        """One sequence at most. Returns how much of the budget it takes."""
        if not fair_share.goes_ahead(list(draft.lane.prefilling.values())):
            return 0
        return self._admit(draft, fair_share.first_part(budget), max_num_seqs=1)

    def _continue_prefills(self, draft: Draft, budget: int) -> int:
        """Returns how much of the budget they take."""
        prefilling, frozen = draft.lane.prefilling, self._replica.frozen
        begun = [each for slot, each in prefilling.items() if slot not in draft.prefills and slot not in frozen]
        if self._fair_share is not None and begun:
            parts = self._fair_share.split(begun, budget)
            for sequence, num_tokens in parts:
                draft.add_prefill(sequence, num_tokens)
            return sum(num_tokens for _, num_tokens in parts)
        left = budget
        for sequence in begun:
            if not left:
                break
            num_tokens = min(left, len(sequence.tokens) - sequence.num_planned)
            draft.add_prefill(sequence, num_tokens)
            left -= num_tokens
        return budget - left

    def _admit_followers(self, draft: Draft, budget: int) -> tuple[int, bool]:
        """In order. Returns how much of the budget they take, and whether there may be room for others."""
        replica, left = self._replica, budget
        for sequence in list(replica.followers):
            num_waiting = len(replica.followers) + len(self._queue)
            if not left or not self._admission.has_room(draft, num_waiting):
                return budget - left, False
            group = sequence.group
            if sequence.status is Status.WAITING and group is not None and group.awaits_donor(sequence, replica.index):
                continue
            if self._admission.admit(sequence, draft, left) < 0:
                return budget - left, False
            replica.followers.remove(sequence)
            left -= draft.prefills[sequence.slot].num_tokens
            if not sequence.started:
                sequence.started = True
                self._events.started.append(Started(sequence.request, 0, is_follower=True))
        return budget - left, True

    def _call_pending(self, draft: Draft) -> None:
        """Leaders whose prompts the step computes to the end: those that waited for them come next, in this replica as
        far as there are slots. Beams always do: they use each other's blocks."""
        replica = self._replica
        for prefill in draft.prefills.values():
            group = prefill.sequence.group
            if group is None or not group.pending or not prefill.samples:
                continue
            called, group.pending = group.pending, []
            num_near = len(replica.slots.free) if replica.accepts else 0
            if prefill.sequence.beam is not None:
                num_near = len(called)
            replica.followers += called[:num_near]
            for sequence in reversed(called[num_near:]):
                self._queue.push_front(sequence)

    def _admit(self, draft: Draft, budget: int, max_num_seqs: int = sys.maxsize, *, only_light: bool = False) -> int:
        """Returns how much of the budget they take."""
        placement, left = self._placement, budget
        if not self._replica.accepts or self._trials.is_under_way(self._replica.index):
            return 0
        while left > 0 and max_num_seqs > 0 and self._admission.has_room(draft, len(self._queue)):
            if self._fair_share is not None:
                self._fair_share.look()
            sequence = self._queue.peek() if placement is None else placement.choose(self._replica.index)
            if sequence is None:
                break
            if self._fair_share is not None:
                self._admission.num_kept_blocks = self._fair_share.num_kept_blocks(sequence)
                if only_light and not self._fair_share.is_light(sequence):
                    break
            num_cached = self._admission.admit(sequence, draft, left)
            if num_cached < 0:
                break
            self._queue.remove(sequence)
            sequence.passed_at.clear()
            max_num_seqs -= 1
            left -= draft.prefills[sequence.slot].num_tokens
            if not sequence.started:
                self._charge(sequence, num_cached)
                sequence.started = True
                self._tell_started(sequence, num_cached)
                if self._replica.enable_prefix_caching:
                    self._counters.num_prefix_queries += len(sequence.tokens)
                    self._counters.num_prefix_hits += num_cached
        return budget - left

    def _admit_suspect(self, draft: Draft, budget: int) -> int:
        """One that nobody enters beside. Returns how much of the budget it takes."""
        index, trials = self._replica.index, self._trials
        sequence = trials.next(index, others_wait=bool(self._queue)) if self._replica.accepts and budget > 0 else None
        if sequence is None or not self._admission.has_room(draft, 1 + len(self._queue)):
            return 0
        self._admission.num_kept_blocks = 0
        if self._admission.admit(sequence, draft, budget) < 0:
            return 0
        trials.begin(index, sequence)
        return draft.prefills[sequence.slot].num_tokens

    def _charge(self, sequence: Sequence, num_cached: int) -> None:
        """Its tenant, for the tokens of its prompt."""
        meter = self._replica.meter
        if meter is not None:
            meter.charge(sequence.request.tenant, max(0, len(sequence.request.prompt) - num_cached))

    def _tell_started(self, sequence: Sequence, num_cached: int) -> None:
        if not isinstance(sequence.group, BeamGroup):
            self._events.started.append(Started(sequence.request, num_cached))
            return
        first, *others = listening(sequence.group)
        self._events.started.append(Started(first, num_cached))
        self._events.started += [Started(request, 0, is_follower=True) for request in others]

    def _preempt(self, sequence: Sequence) -> None:
        """Its blocks go; what it needs to go on with is computed again."""
        replica = self._replica
        self._counters.num_preemptions += 1
        if sequence.status is Status.PARKED:
            replica.unpark(sequence, Status.WAITING)
            return  # a follower, or one that is answered and only kept its blocks for those to come
        replica.leave(sequence, Status.WAITING)
        if sequence.beam is not None and sequence.started:
            replica.followers.insert(0, sequence)
        else:
            self._queue.push_front(sequence)
