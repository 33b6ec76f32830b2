"""The scheduler: one queue, any number of replicas, two verbs. `plan` says what a replica's workers compute next, and
`apply` takes their answer. Synchronous and deterministic; no clock, no I/O.
"""

from collections.abc import Mapping
from itertools import islice
from typing import Literal

from manta.scheduler.admission import check_beams_fit, check_capacities, check_fits
from manta.scheduler.beam_search import BeamParams
from manta.scheduler.fair_queue import FairQueue
from manta.scheduler.group import BeamGroup, Group, listening
from manta.scheduler.grouping import leaders_of, samples_of, search_of
from manta.scheduler.integrity import check_groups, check_moves, check_placement, check_replica, check_waiting
from manta.scheduler.moves import Moves
from manta.scheduler.outcome import apply_result, finish, finished_with_error
from manta.scheduler.placement import Placement
from manta.scheduler.planner import Planner
from manta.scheduler.prefix import PrefixHasher
from manta.scheduler.replica import Replica
from manta.scheduler.sequence import Sequence, Status
from manta.scheduler.snapshot import Snapshot, take_snapshot
from manta.scheduler.tenants import TenantMeter
from manta.scheduler.trials import Trials, members_of
from manta.scheduler.types import (
    Capacity,
    Counters,
    Events,
    Finished,
    QueueFullError,
    Request,
    StepPlan,
    StepResult,
)
from manta.scheduler.waiting import FcfsQueue, PriorityQueue, WaitingQueue

Policy = Literal["fcfs", "priority", "fair"]

_NO_EVENTS = Events()
_WINDOW_STEPS = 64  # full steps of every replica: what tenants were served in these is lately
_NUM_LOOKED_AT = 64  # sequences that a lost replica had are in front


class Scheduler:
    """A request waits in the one queue until `plan` of some replica has room for it and no other is known to be better.
    What the outside must hear of is in the Events of `apply` and `abort`; whatever `add` and `plan` bring about comes
    with the next of these, or at once with `take_events`.

    Raises ValueError for capacities or weights that cannot work.
    """

    def __init__(
        self,
        replicas: list[Capacity],
        *,
        policy: Policy = "fcfs",
        tenant_weights: Mapping[str, float] | None = None,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        max_num_queued_reqs: int = 4096,
        max_num_queued_tokens: int | None = None,
    ) -> None:
        check_capacities(replicas)
        self.counters = Counters()
        self._capacities = replicas
        self._max_model_len = min(capacity.max_model_len for capacity in replicas)
        self._enable_chunked_prefill = enable_chunked_prefill
        self._max_num_queued_reqs = max_num_queued_reqs
        self._max_num_queued_tokens = max_num_queued_tokens
        self._num_arrived = 0
        self._sequences: dict[int, Sequence] = {}  # by request id, waiting or resident; without beams
        self._searches: dict[int, BeamGroup] = {}  # by request id
        self._groups: dict[Group, None] = {}
        window = _WINDOW_STEPS * sum(capacity.max_num_batched_tokens for capacity in replicas)
        meter = TenantMeter(tenant_weights or {}, window) if policy == "fair" else None
        self._queue = _queue_of(policy, meter)
        self._events = Events()
        hasher = PrefixHasher(self._max_model_len if enable_prefix_caching else 0, replicas[0].block_size)
        self._replicas = [
            Replica(
                i,
                capacity,
                hasher,
                enable_prefix_caching=enable_prefix_caching,
                use_priority=policy == "priority",
                meter=meter,
            )
            for i, capacity in enumerate(replicas)
        ]
        self._placement = Placement(self._replicas, self._queue, meter) if len(replicas) > 1 else None
        closed = set() if self._placement is None else self._placement.closed
        self._trials = Trials(self._replicas, closed)
        self.moves = Moves(self._replicas, self._queue, self.counters, closed, self._trials)
        self._planners = [
            Planner(
                replica,
                self._queue,
                self._placement,
                self._trials,
                self.counters,
                self._events,
                enable_chunked_prefill,
            )
            for replica in self._replicas
        ]

    def add(self, request: Request, *, resubmitted: bool = False) -> None:
        """Puts a request into the queue; a full queue takes what was taken before elsewhere.

        Raises TooLongError if it can never run, QueueFullError if it may be taken later, RefusedError for an empty
        prompt or no tokens to generate, ValueError if its id is in use.
        """
        self._check_ids([request])
        check_fits(request, self._capacities, self._enable_chunked_prefill)
        sequence = Sequence.of(request, self._num_arrived, self._max_model_len)
        if len(request.output) and self._is_over(sequence):
            return
        if not resubmitted:
            self._check_queue(request)
        self._num_arrived += 1
        self._sequences[request.id] = sequence
        self._queue.push(sequence)

    def add_group(self, requests: list[Request]) -> None:
        """As `add`, for several samples of one prompt, none of which has output yet: it is computed once, and they
        share its blocks. They differ in id and sampling. All of them are taken, or none."""
        self._check_ids(requests)
        check_fits(requests[0], self._capacities, self._enable_chunked_prefill)
        self._check_queue(requests[0])
        group = samples_of(requests, self._num_arrived, self._max_model_len)
        self._num_arrived += len(requests)
        self._sequences |= {sequence.request.id: sequence for sequence in group.members}
        self._groups[group] = None
        self._queue.push(group.members[0])

    def add_search(self, requests: list[Request], params: BeamParams, *, resubmitted: bool = False) -> None:
        """As `add`, for a beam search, whose best hypotheses `requests` get. These differ in id alone; stop tokens are
        those of `params`, and what they ask of log-probabilities does not count. They hear nothing until the search is
        over. Their `sampling` must ask for the log-probabilities of params.num_candidates tokens.

        Raises ValueError for more requests than beams.
        """
        if len(requests) > params.width:
            raise ValueError(f"{len(requests)} hypotheses are asked of a search with {params.width} beams")
        self._check_ids(requests)
        first = requests[0]
        check_beams_fit(first, params.width, self._capacities, self._enable_chunked_prefill)
        if not resubmitted:
            self._check_queue(first)
        group = search_of(requests, params, self._num_arrived, self._max_model_len)
        self._num_arrived += 1
        self._searches |= dict.fromkeys((request.id for request in requests), group)
        self._groups[group] = None
        self._queue.push(group.members[0])

    def _check_ids(self, requests: list[Request]) -> None:
        ids = [request.id for request in requests]
        for id in ids:
            if id in self._sequences or id in self._searches or ids.count(id) > 1:
                raise ValueError(f"request id {id} is in use")

    def abort(self, request_id: int) -> Events:
        """Ends a request wherever it is. Its tokens in flight are dropped. An unknown id changes nothing."""
        sequence = self._sequences.pop(request_id, None)
        group = self._searches.pop(request_id, None)
        if sequence is not None:
            if sequence.status in (Status.WAITING, Status.PARKED, Status.MOVING):
                self._stop_waiting(sequence)
                num_output_tokens = len(sequence.tokens) - len(sequence.request.prompt)
                self._events.finished.append(Finished(sequence.request, "abort", None, num_output_tokens))
            else:
                finish(self._replicas[sequence.replica], sequence, "abort", None, self._events)
            self._leave_group(sequence)
        elif group is not None:
            self._abort_search(group, request_id)
        return self.take_events()

    def _abort_search(self, group: BeamGroup, request_id: int) -> None:
        """One of its requests leaves; with the last one the search ends."""
        for place, request in enumerate(group.requests):
            if request is not None and request.id == request_id:
                group.requests[place] = None
                self._events.finished.append(Finished(request, "abort"))
        if any(request is not None for request in group.requests):
            return
        for member in group.members:
            if member.status is Status.PARKED:
                replica = self._replicas[member.replica]
                replica.unpark(member, Status.FINISHED)
                if member in replica.followers:
                    replica.followers.remove(member)
            elif member.status is not Status.WAITING:
                self._replicas[member.replica].leave(member, Status.FINISHED)
            elif not (member.beam and member.beam.record):
                self._stop_waiting(member)
        del self._groups[group]

    def _stop_waiting(self, sequence: Sequence) -> None:
        """A sequence without slot ends; it is in the queue, waits for a leader or a trial, follows or moves."""
        if sequence.status is Status.MOVING:
            self.moves.drop(sequence)
            sequence.status = Status.FINISHED
            return
        if sequence.status is Status.PARKED:
            self._replicas[sequence.replica].unpark(sequence, Status.FINISHED)
        sequence.status = Status.FINISHED
        pending = [] if sequence.group is None else [sequence.group.pending]
        for waiting in (*pending, *(replica.followers for replica in self._replicas)):
            if sequence in waiting:
                waiting.remove(sequence)
                return
        if not self._trials.drop(sequence):
            self._queue.remove(sequence)

    def _leave_group(self, sequence: Sequence) -> None:
        """The sequence has ended. Where it was to compute the prompt for others, one of these does."""
        group = sequence.group
        if group is None:
            return
        group.members.remove(sequence)
        if group.pending and not group.has_leader():
            self._queue.push_front(group.pending.pop(0))
        if not group.members:
            del self._groups[group]

    def plan(self, replica: int = 0) -> StepPlan | None:
        """The replica's next step; None if there is nothing to run now or max_in_flight plans are unanswered. Every
        plan must be sent, in order."""
        if self._placement is not None and replica in self._placement.closed:
            return None
        return self._planners[replica].plan()

    def apply(self, result: StepResult, replica: int = 0) -> Events:
        """Takes the answer to the replica's oldest unanswered plan; one of an earlier epoch changes nothing.

        Raises WrongResultError, and changes nothing, if it does not answer that plan.
        """
        apply_result(self._replicas[replica], result, self._events)
        for finished in self._events.finished:
            sequence = self._sequences.get(finished.request.id)
            if sequence is not None and sequence.status is Status.FINISHED:
                del self._sequences[finished.request.id]
                self._leave_group(sequence)
            elif (group := self._searches.pop(finished.request.id, None)) is not None:
                self._groups.pop(group, None)
        return self.take_events()

    def take_events(self) -> Events:
        """What happened since events were last handed out."""
        ours = self._events
        events = Events(ours.request_ids, ours.tokens, ours.started, ours.finished, ours.logprobs)
        ours.request_ids, ours.tokens = _NO_EVENTS.request_ids, _NO_EVENTS.tokens
        ours.started, ours.finished, ours.logprobs = [], [], []
        return events

    def reset(self, replica: int = 0) -> None:
        """The replica's workers have lost everything: its sequences go back to the queue with their tokens, first
        admitted first, and its epoch rises, so that answers to earlier plans are ignored."""
        picture = self._replicas[replica]
        waiting = sorted(picture.residents.values(), key=lambda sequence: sequence.rank)
        for sequence in waiting:
            picture.leave(sequence, Status.WAITING)
        for sequence in list(picture.parked):
            picture.unpark(sequence, Status.WAITING)
        waiting += picture.followers
        waiting += self.moves.lose(replica)
        picture.clear()
        for sequence in reversed([each for each in leaders_of(waiting) if not self._trials.takes(each)]):
            self._queue.push_front(sequence)

    def fail_replica(self, replica: int, reason: str, workers: int = 0, num_steps: int | None = None) -> Events:
        """As `close_replica`, for one that has failed while it ran what it had. Requests that are to blame end with an
        error (see `trials`); the others go on. `workers`: another number whenever the replica has new ones. num_steps:
        so many of its unanswered plans, the oldest ones, can have to do with the failure; None for all."""
        convicted = self._trials.judge(replica, workers, num_steps, others_wait=bool(self._queue))
        requests = [member.request for unit in convicted for member in members_of(unit)]
        requests += [request for unit in convicted if isinstance(unit, Group) for request in listening(unit)]
        self.close_replica(replica)
        message = f"the workers fail whenever they run this request: {reason}"
        for request in requests:
            ended = self.abort(request.id)
            ended.finished = [finished_with_error(each, message) for each in ended.finished]
            self._events.finished += ended.finished
        return self.take_events()

    def num_excused(self, replica: int) -> int:
        """How often the replica has failed in a way that requests, not it, are blamed for."""
        return self._trials.num_excused[replica]

    def close_replica(self, replica: int) -> None:
        """As `reset`, for one that nobody will plan until `open_replica`: no request waits for it."""
        self.reset(replica)
        self._replicas[replica].accepts = True
        if self._placement is not None:
            self._placement.close(replica)

    def give_up_replica(self, replica: int) -> None:
        """It is closed, and nobody should wait for it."""
        self._trials.expect(replica, will_come=False)

    def open_replica(self, replica: int) -> None:
        """It has workers and will be planned; as all are at first."""
        self._trials.expect(replica, will_come=False)
        if self._placement is not None:
            self._placement.open(replica)

    @property
    def idle_replicas(self) -> frozenset[int]:
        """Those that found nothing to run when they were planned last, but requests that others should take. They
        should be planned again when a step of another one is answered, and if none is, after a while."""
        return frozenset() if self._placement is None else frozenset(self._placement.idle)

    def check(self) -> None:
        """Raises AssertionError naming what is broken in the scheduler's own books."""
        for replica in self._replicas:
            check_replica(replica)
        check_waiting(self._queue)
        if self._placement is not None:
            check_placement(self._placement, self._replicas)
        here = list(self._queue)
        for replica in self._replicas:
            here += replica.residents.values()
            here += replica.followers
        check_moves(self.moves, self._replicas)
        here += self.moves.sequences
        here += self._trials.waiting
        for group in self._groups:
            here += group.pending
        expected = {sequence.request.id: sequence for sequence in here if sequence.beam is None}
        assert expected == self._sequences, "requests known, and requests waiting or resident, differ"
        check_groups(self._groups, here)
        searches = {request.id: group for group in self._groups for request in listening(group)}
        assert searches == self._searches, "requests of searches, and searches, differ"

    def snapshot(self) -> Snapshot:
        """The block tables as they are now."""
        return take_snapshot(self._replicas, self._queue)

    @property
    def num_running(self) -> int:
        """Sequences that have slots or, beams between two steps and who moves, blocks."""
        return sum(map(self.num_resident, range(len(self._replicas))))

    @property
    def num_waiting(self) -> int:
        num_waiting = len(self._queue) + len(self._trials.waiting)
        for replica in self._replicas:
            num_waiting += sum(sequence.status is Status.WAITING for sequence in replica.followers)
        return num_waiting + sum(len(group.pending) for group in self._groups)

    def num_of_priority(self, priority: int) -> int:
        """Requests of that priority, running or waiting; beam searches are not among them."""
        return sum(sequence.request.priority == priority for sequence in self._sequences.values())

    @property
    def num_waiting_tokens(self) -> int:
        return self._queue.num_tokens

    def num_resident(self, replica: int = 0) -> int:
        """Sequences of one replica, or on their way there, as num_running."""
        picture = self._replicas[replica]
        return len(picture.residents) + len(picture.parked) + picture.num_expected

    def first_arrival_s(self) -> float | None:
        """When the first request in the queue came that has not begun; None if there is none near its head."""
        for sequence in islice(self._queue, _NUM_LOOKED_AT):
            if not sequence.started:
                return sequence.request.arrival_s
        return None

    def num_in_flight(self, replica: int = 0) -> int:
        return len(self._replicas[replica].in_flight)

    def num_free_blocks(self, replica: int = 0) -> int:
        return self._replicas[replica].pool.num_free

    def _check_queue(self, request: Request) -> None:
        """A full queue still takes from a tenant what is within its share."""
        num_waiting, num_waiting_tokens = len(self._queue), self._queue.num_tokens
        num_tokens = len(request.prompt) + len(request.output)
        num_own, num_own_tokens, num_tenants = self._queue.share_of(request.tenant)
        if num_waiting >= self._max_num_queued_reqs and num_own * num_tenants >= self._max_num_queued_reqs:
            raise QueueFullError(f"{num_waiting} requests are waiting, the queue holds {self._max_num_queued_reqs}")
        limit = self._max_num_queued_tokens
        if limit is None or num_waiting_tokens + num_tokens <= limit:
            return
        # A prompt above the limit is taken when it is alone: later would be no better.
        if num_own and (num_own_tokens + num_tokens) * num_tenants > limit:
            raise QueueFullError(
                f"{num_waiting_tokens} tokens are waiting and the prompt has {num_tokens}, the queue holds {limit}"
            )

    def _is_over(self, sequence: Sequence) -> bool:
        """Whether a resubmitted request had ended already; only its end was not delivered."""
        num_tokens, last = len(sequence.tokens), int(sequence.tokens[-1])
        stopped = sequence.stops_at(last, num_tokens)
        if not stopped and num_tokens < sequence.max_length:
            return False
        num_output_tokens = len(sequence.request.output)
        end = Finished(sequence.request, "stop", last, num_output_tokens)
        self._events.finished.append(end if stopped else Finished(sequence.request, "length", None, num_output_tokens))
        return True


def _queue_of(policy: Policy, meter: TenantMeter | None) -> WaitingQueue:
    if meter is not None:
        return FairQueue(meter)
    return PriorityQueue() if policy == "priority" else FcfsQueue()
