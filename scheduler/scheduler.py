"""The scheduler: one queue, any number of replicas, two verbs. `plan` says what a replica's workers compute next, and
`apply` takes their answer. Synchronous and deterministic; no clock, no I/O.
"""

from typing import Literal

from manta.scheduler.admission import check_fits
from manta.scheduler.integrity import check_replica, check_waiting
from manta.scheduler.outcome import apply_result, finish
from manta.scheduler.planner import Planner
from manta.scheduler.prefix import PrefixHasher
from manta.scheduler.replica import Replica
from manta.scheduler.sequence import Sequence, Status
from manta.scheduler.snapshot import Snapshot, take_snapshot
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

_NO_EVENTS = Events()


class Scheduler:
    """A request waits in the one queue until `plan` of some replica has room for it. What the outside must hear of is
    in the Events of `apply` and `abort`; whatever `add` and `plan` bring about comes with the next of these, or
    at once with `take_events`.

    Raises ValueError for capacities that cannot work.
    """

    def __init__(
        self,
        replicas: list[Capacity],
        *,
        policy: Literal["fcfs", "priority"] = "fcfs",
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        max_num_queued_reqs: int = 4096,
        max_num_queued_tokens: int | None = None,
    ) -> None:
        _check_capacities(replicas)
        self.counters = Counters()
        self._capacities = replicas
        self._max_model_len = min(capacity.max_model_len for capacity in replicas)
        self._enable_chunked_prefill = enable_chunked_prefill
        self._max_num_queued_reqs = max_num_queued_reqs
        self._max_num_queued_tokens = max_num_queued_tokens
        self._num_arrived = 0
        self._sequences: dict[int, Sequence] = {}  # by request id, waiting or resident
        self._queue: WaitingQueue = PriorityQueue() if policy == "priority" else FcfsQueue()
        self._events = Events()
        hasher = PrefixHasher(self._max_model_len if enable_prefix_caching else 0, replicas[0].block_size)
        self._replicas = [
            Replica(i, capacity, hasher, enable_prefix_caching=enable_prefix_caching, use_priority=policy == "priority")
            for i, capacity in enumerate(replicas)
        ]
        self._planners = [
            Planner(replica, self._queue, self.counters, self._events, enable_chunked_prefill)
            for replica in self._replicas
        ]

    def add(self, request: Request) -> None:
        """Puts a request into the queue. One that carries output has begun elsewhere: a full queue takes it too.

        Raises TooLongError if it can never run, QueueFullError if it may be taken later, RefusedError for an empty
        prompt or no tokens to generate, ValueError if its id is in use.
        """
        if request.id in self._sequences:
            raise ValueError(f"request id {request.id} is in use")
        check_fits(request, self._capacities, self._enable_chunked_prefill)
        sequence = Sequence.of(request, self._num_arrived, self._max_model_len)
        num_tokens = len(sequence.tokens)
        if len(request.output) and self._is_over(sequence):
            return
        if not len(request.output):
            self._check_queue(num_tokens)
        self._num_arrived += 1
        self._sequences[request.id] = sequence
        self._queue.push(sequence)

    def abort(self, request_id: int) -> Events:
        """Ends a request wherever it is. Its tokens in flight are dropped. An unknown id changes nothing."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            if sequence.status is Status.WAITING:
                self._queue.remove(sequence)
                sequence.status = Status.FINISHED
                num_output_tokens = len(sequence.tokens) - len(sequence.request.prompt)
                self._events.finished.append(Finished(sequence.request, "abort", None, num_output_tokens))
            else:
                finish(self._replicas[sequence.replica], sequence, "abort", None, self._events)
        return self.take_events()

    def plan(self, replica: int = 0) -> StepPlan | None:
        """The replica's next step; None if there is nothing to run now or max_in_flight plans are unanswered. Every
        plan must be sent, in order."""
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
        for sequence in sorted(picture.residents.values(), key=lambda sequence: sequence.rank, reverse=True):
            picture.leave(sequence, Status.WAITING)
            self._queue.push_front(sequence)
        picture.clear()

    def check(self) -> None:
        """Raises AssertionError naming what is broken in the scheduler's own books."""
        for replica in self._replicas:
            check_replica(replica)
        check_waiting(self._queue)
        expected = {sequence.request.id: sequence for sequence in self._queue}
        for replica in self._replicas:
            expected |= {sequence.request.id: sequence for sequence in replica.residents.values()}
        assert expected == self._sequences, "requests known, and requests waiting or resident, differ"

    def snapshot(self) -> Snapshot:
        """The block tables as they are now."""
        return take_snapshot(self._replicas, self._queue)

    @property
    def num_running(self) -> int:
        return sum(len(replica.residents) for replica in self._replicas)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_waiting_tokens(self) -> int:
        return self._queue.num_tokens

    def num_in_flight(self, replica: int = 0) -> int:
        return len(self._replicas[replica].in_flight)

    def num_free_blocks(self, replica: int = 0) -> int:
        return self._replicas[replica].pool.num_free

    def _check_queue(self, num_tokens: int) -> None:
        num_waiting, num_waiting_tokens = len(self._queue), self._queue.num_tokens
        if num_waiting >= self._max_num_queued_reqs:
            raise QueueFullError(f"{num_waiting} requests are waiting, the queue holds {self._max_num_queued_reqs}")
        limit = self._max_num_queued_tokens
        # A prompt above the limit is taken when it is alone: later would be no better.
        if limit is not None and num_waiting and num_waiting_tokens + num_tokens > limit:
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


def _check_capacities(replicas: list[Capacity]) -> None:
    if not replicas:
        raise ValueError("a scheduler needs at least one replica")
    block_sizes = {capacity.block_size for capacity in replicas}
    if len(block_sizes) > 1:  # a sequence keeps its block hashes when it moves
        raise ValueError(f"replicas have block sizes {sorted(block_sizes)}; they must be equal")
    for i, capacity in enumerate(replicas):
        if capacity.max_num_batched_tokens < capacity.max_num_seqs:
            raise ValueError(
                f"replica {i}: max_num_batched_tokens={capacity.max_num_batched_tokens} must be at least "
                f"max_num_seqs={capacity.max_num_seqs}: every running sequence takes one token of a step"
            )
        if capacity.num_lanes > capacity.max_num_seqs:
            raise ValueError(
                f"replica {i}: max_num_seqs={capacity.max_num_seqs} must be at least the {capacity.num_lanes} lanes"
            )
