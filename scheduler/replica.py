"""The scheduler's picture of one replica: what its workers hold, and which plans they have not answered.

Sequences come in by `enter` and go out by `leave`, nowhere else. The planner and `apply` work on this picture.
"""

from collections import deque
from collections.abc import Iterator

from manta.scheduler.block_pool import BlockPool
from manta.scheduler.in_flight import InFlightStep
from manta.scheduler.lane import Lane
from manta.scheduler.prefix import extend_chain
from manta.scheduler.sequence import Sequence, Status
from manta.scheduler.slots import SlotTable
from manta.scheduler.stops import StopTable
from manta.scheduler.types import Capacity, StepResult, WrongResultError

TOKEN_BYTES = 4


class Replica:
    def __init__(self, index: int, capacity: Capacity, *, enable_prefix_caching: bool, use_priority: bool) -> None:
        self.index = index
        self.capacity = capacity
        self.enable_prefix_caching = enable_prefix_caching
        self.use_priority = use_priority
        self.epoch = 0
        self.num_admitted = 0
        self.clear()

    def clear(self) -> None:
        """A new epoch: the workers hold nothing."""
        capacity = self.capacity
        self.epoch += 1
        self.step = 0  # the last one planned
        self.pool = BlockPool(capacity.num_blocks)
        self.slots = SlotTable(capacity.max_num_seqs)
        self.stops = StopTable()
        self.lanes = [Lane(i, capacity.block_size, capacity.max_num_seqs) for i in range(capacity.num_lanes)]
        self.next_lane = 0
        self.residents: dict[int, Sequence] = {}  # by slot, in order of admission
        self.starved: dict[int, Sequence] = {}  # by slot: held back for want of a block that limbo will give
        self.in_flight: deque[InFlightStep] = deque()
        self.frees: list[int] = []  # slots that the workers have not been told of

    def enter(self, sequence: Sequence, lane: Lane) -> None:
        """The sequence, which has its blocks, takes a slot and joins the lane."""
        self.slots.widen(len(sequence.blocks) * self.capacity.block_size + 1)
        sequence.slot = self.slots.take(sequence)
        sequence.replica = self.index
        sequence.status = Status.PREFILLING
        sequence.rank = (sequence.request.priority if self.use_priority else 0, self.num_admitted)
        self.num_admitted += 1
        self.residents[sequence.slot] = sequence
        self.stops.add(sequence.request.stop_token_ids)
        lane.join(sequence)

    def leave(self, sequence: Sequence, status: Status) -> None:
        """Gives back slot and blocks; the sequence keeps the tokens that are confirmed."""
        slot = sequence.slot
        num_tokens = self.num_tokens(sequence)
        self.publish(sequence, self.num_computed(sequence) // self.capacity.block_size)
        sequence.tokens = self.slots.tokens[slot, :num_tokens].copy()
        self.lanes[sequence.lane].leave(sequence)
        until = self.step if self.in_flight else None
        self.pool.release(sequence.blocks, until)
        self.slots.release(slot, until)
        self.stops.remove(sequence.request.stop_token_ids)
        del self.residents[slot]
        self.starved.pop(slot, None)
        for step in self.in_flight:
            step.drop(slot)
        self.frees.append(slot)
        sequence.status = status
        sequence.replica = sequence.slot = sequence.lane = -1
        sequence.blocks = []
        sequence.num_planned = sequence.num_computed = sequence.num_published = 0

    def num_tokens(self, sequence: Sequence) -> int:
        """Tokens of a resident sequence whose values are known."""
        if sequence.status is Status.PREFILLING:
            return len(sequence.tokens)
        return self.planned_length(sequence) - sum(step.samples(sequence.slot) for step in self.in_flight)

    def planned_length(self, sequence: Sequence) -> int:
        """Tokens of a resident sequence when every plan is answered."""
        match sequence.status:
            case Status.DECODING:
                return self.lanes[sequence.lane].length(sequence.slot)
            case Status.DRAINING:
                return sequence.max_length
            case _:
                return len(sequence.tokens)

    def num_computed(self, sequence: Sequence) -> int:
        """Tokens of a resident sequence whose KV is known to exist."""
        if sequence.num_computed < len(sequence.tokens):
            return sequence.num_computed
        return self.num_tokens(sequence) - 1

    def hashes(self, sequence: Sequence) -> Iterator[bytes]:
        """Hashes of a waiting sequence's full blocks, computed as they are asked for and kept."""
        block_size = self.capacity.block_size
        for index in range(len(sequence.tokens) // block_size):
            if index == len(sequence.hashes):
                tokens = sequence.tokens[index * block_size : (index + 1) * block_size].tobytes()
                extend_chain(sequence.hashes, sequence.root, tokens, block_size * TOKEN_BYTES)
            yield sequence.hashes[index]

    def publish(self, sequence: Sequence, num_full: int) -> None:
        """The KV of its first `num_full` blocks exists."""
        start = sequence.num_published
        if not self.enable_prefix_caching or num_full <= start:
            return
        block_size = self.capacity.block_size
        hashes = sequence.hashes
        if len(hashes) < num_full:
            row = self.slots.tokens[sequence.slot, len(hashes) * block_size : num_full * block_size]
            extend_chain(hashes, sequence.root, row.tobytes(), block_size * TOKEN_BYTES)
        for index in range(start, num_full):
            self.pool.publish(sequence.blocks[index], hashes[index])
        sequence.num_published = num_full

    def confirm(self, result: StepResult) -> InFlightStep | None:
        """The plan that `result` answers, which is no longer in flight; None for a result of an earlier epoch.

        Raises WrongResultError if it answers no plan or has a wrong number of tokens.
        """
        if result.epoch < self.epoch:
            return None
        expected = self.in_flight[0] if self.in_flight else None
        if result.epoch > self.epoch or expected is None or result.step != expected.step:
            awaited = "none" if expected is None else f"step {expected.step} of epoch {self.epoch}"
            raise WrongResultError(
                f"replica {self.index} answered step {result.step} of epoch {result.epoch}; awaited: {awaited}"
            )
        if len(result.tokens) != expected.num_sampled:
            raise WrongResultError(
                f"replica {self.index} sampled {len(result.tokens)} tokens in step {result.step}, "
                f"the plan has {expected.num_sampled} rows that sample"
            )
        self.in_flight.popleft()
        self.pool.confirm(result.step)
        self.slots.confirm(result.step)
        return expected
