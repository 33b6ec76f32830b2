"""The scheduler's picture of one replica: what its workers hold, and which plans they have not answered.

Sequences come in by `enter` and go out by `leave`, nowhere else. The planner and `apply` work on this picture.
"""

from collections import deque

import numpy as np

from manta.scheduler.block_pool import BlockPool
from manta.scheduler.in_flight import InFlightStep
from manta.scheduler.lane import Lane
from manta.scheduler.logprobs import num_record_bytes
from manta.scheduler.pooling import num_vector_bytes
from manta.scheduler.prefix import PrefixHasher
from manta.scheduler.sequence import Sequence, Status
from manta.scheduler.slots import SlotTable
from manta.scheduler.stops import StopTable
from manta.scheduler.tenants import TenantMeter
from manta.scheduler.types import Capacity, StepResult, WrongResultError

_PUBLISH_STRIDE = 64
HASH_STRIDE = 128  # blocks hashed at a time where nobody knows yet how many will be found


class Replica:
    def __init__(
        self,
        index: int,
        capacity: Capacity,
        hasher: PrefixHasher,
        *,
        enable_prefix_caching: bool,
        use_priority: bool,
        meter: TenantMeter | None = None,
    ) -> None:
        """meter: charged for tokens of output, if there is one."""
        self.index = index
        self.capacity = capacity
        self.hasher = hasher
        self.enable_prefix_caching = enable_prefix_caching
        self.use_priority = use_priority
        self.meter = meter
        self.tenants = np.zeros(capacity.max_num_seqs, np.intp)  # by slot: the meter's number
        self.epoch = 0
        self.num_admitted = 0
        self.accepts = True  # False: it takes nobody from the queue, because it is about to go
        self.clear()

    def clear(self) -> None:
        """A new epoch: the workers hold nothing."""
        capacity = self.capacity
        self.epoch += 1
        self.step = 0  # the last one planned
        self.pool = BlockPool(capacity.num_blocks)
        self.slots = SlotTable(capacity.max_num_seqs, capacity.block_size)
        self.stops = StopTable()
        self.lanes = [Lane(i, capacity.block_size, capacity.max_num_seqs) for i in range(capacity.num_lanes)]
        self.next_lane = 0
        self.residents: dict[int, Sequence] = {}  # by slot
        self.num_asking = 0  # residents that want log-probabilities
        self.parked: dict[Sequence, None] = {}  # have blocks and no slot
        self.followers: list[Sequence] = []  # waiting or parked; they enter this replica before anyone from the queue
        self.starved: dict[int, Sequence] = {}  # by slot: held back for want of a block that limbo will give
        self.frozen: dict[int, Sequence] = {}  # by slot: nothing more is planned of them, they are about to move
        self.lent: dict[int, list[int]] = {}  # by move: blocks that are read elsewhere, as often as tables had them
        self.reserved: dict[int, list[int]] = {}  # by move: blocks that are being written, for sequences to come
        self.num_expected = 0  # sequences that are on their way here: each will need a slot
        self.in_flight: deque[InFlightStep] = deque()
        self._filled: dict[int, int] = {}  # by slot: full blocks of decoding sequences, perhaps not published yet
        self.frees: list[int] = []  # slots that the workers have not been told of

    def enter(self, sequence: Sequence, lane: Lane) -> None:
        """The sequence, which has its blocks, takes a slot and joins the lane."""
        self.slots.widen(len(sequence.blocks) * self.capacity.block_size + 1)
        sequence.slot = self.slots.take(sequence)
        sequence.replica = self.index
        sequence.status = Status.PREFILLING
        importance = sequence.request.priority if self.use_priority else 0
        if self.meter is not None:
            number = self.tenants[sequence.slot] = self.meter.number(sequence.request.tenant)
            self.meter.num_running[number] += 1
            importance = int(not self.meter.is_light[number])
        if sequence.beam is None or not sequence.started:  # a beam keeps the place of its search
            sequence.rank = (importance, self.num_admitted)
            self.num_admitted += 1
        self.residents[sequence.slot] = sequence
        self.stops.add(sequence.request.stop_token_ids)
        self.num_asking += sequence.request.asks_logprobs
        lane.join(sequence)

    def leave(self, sequence: Sequence, status: Status) -> None:
        """Gives back slot and blocks; the sequence keeps the tokens that are confirmed."""
        self._give_up_slot(sequence)
        self._forget_blocks(sequence, status)

    def lend(self, sequence: Sequence, move: int) -> tuple[list[int], int]:
        """As `leave`, for a frozen sequence of which nothing is in flight: its blocks stay as they are until the move
        is over. Returns them, and of how many tokens they hold the KV."""
        num_computed = self.num_computed(sequence)
        self._give_up_slot(sequence)
        blocks = sequence.blocks[: -(-num_computed // self.capacity.block_size)]
        self.pool.release(sequence.blocks[len(blocks) :], self.last_in_flight)
        self.lent.setdefault(move, []).extend(blocks)
        sequence.blocks = []
        self._forget_blocks(sequence, Status.MOVING)
        return blocks, num_computed

    def is_in_flight(self, sequence: Sequence) -> bool:
        """Whether a plan that computes something of it is unanswered."""
        slot = sequence.slot
        return any(slot in step.prefills or step.samples(slot) for step in self.in_flight)

    def _give_up_slot(self, sequence: Sequence) -> None:
        slot = sequence.slot
        num_tokens = self.num_tokens(sequence)
        self.publish(sequence, self.num_computed(sequence) // self.capacity.block_size)
        sequence.tokens = self.slots.tokens[slot, :num_tokens].copy()
        self._vacate(sequence, self.last_in_flight)
        self._filled.pop(slot, None)
        self.starved.pop(slot, None)
        self.frozen.pop(slot, None)
        for step in self.in_flight:
            step.drop(slot)

    def park(self, sequence: Sequence) -> None:
        """The last step of a sequence is answered: it gives back its slot, at once, and keeps its blocks."""
        self._vacate(sequence, None)
        sequence.status = Status.PARKED
        self.parked[sequence] = None

    def unpark(self, sequence: Sequence, status: Status) -> None:
        """Gives back the blocks of a parked sequence."""
        del self.parked[sequence]
        self._forget_blocks(sequence, status)

    def _vacate(self, sequence: Sequence, until: int | None) -> None:
        """Lane and slot are without it; the slot may be taken again once step `until` is answered."""
        slot = sequence.slot
        self.lanes[sequence.lane].leave(sequence)
        self.slots.release(slot, until)
        self.stops.remove(sequence.request.stop_token_ids)
        self.num_asking -= sequence.request.asks_logprobs
        del self.residents[slot]
        if self.meter is not None:
            self.meter.num_running[self.tenants[slot]] -= 1
        self.frees.append(slot)
        sequence.slot = sequence.lane = -1

    def _forget_blocks(self, sequence: Sequence, status: Status) -> None:
        self.pool.release(sequence.blocks, self.last_in_flight)
        sequence.status = status
        sequence.replica = -1
        sequence.blocks = []
        sequence.num_planned = sequence.num_computed = sequence.num_published = 0

    @property
    def last_in_flight(self) -> int | None:
        """What is given back may be used again once this step is answered."""
        return self.step if self.in_flight else None

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
        if sequence.num_computed < len(sequence.tokens) or sequence.request.pooling is not None:
            return sequence.num_computed
        return self.num_tokens(sequence) - 1

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """The blocks that hold the KV of a waiting sequence's first tokens, as far as the prefix index knows them."""
        found: list[int] = []
        if not self.enable_prefix_caching:
            return found
        self._publish_filled()
        hashes = sequence.hashes
        while True:
            found += self.pool.find(hashes[len(found) :])
            # What is hashed here and not found need not be hashed when it is published; more can wait until then.
            if len(found) < len(hashes) or not self.hash_more(sequence, HASH_STRIDE):
                return found

    def hash_more(self, sequence: Sequence, num_blocks: int) -> bool:
        """Hashes the next blocks of a waiting sequence, as far as they are full; False if there are none."""
        block_size, hashes = self.capacity.block_size, sequence.hashes
        num_hashed = min(len(hashes) + num_blocks, len(sequence.tokens) // block_size)
        if not self.enable_prefix_caching or num_hashed <= len(hashes):
            return False
        self.hasher.extend(hashes, sequence.root, sequence.tokens[len(hashes) * block_size : num_hashed * block_size])
        return True

    def publish(self, sequence: Sequence, num_full: int) -> None:
        """The KV of its first `num_full` blocks exists, or is written by a step that is planned."""
        start = sequence.num_published
        if not self.enable_prefix_caching or num_full <= start:
            return
        block_size = self.capacity.block_size
        hashes = sequence.hashes
        if len(hashes) < num_full:
            tokens = self.slots.tokens[sequence.slot, len(hashes) * block_size : num_full * block_size]
            self.hasher.extend(hashes, sequence.root, tokens)
        self.pool.publish(sequence.blocks[start:num_full], hashes[start:num_full])
        sequence.num_published = num_full

    def note_filled(self, filled: dict[int, int]) -> None:
        """By slot, how many blocks of decoding sequences are full. They are published when they are enough for numpy
        to be quick, or when somebody is about to look something up."""
        self._filled |= filled
        if len(self._filled) >= _PUBLISH_STRIDE:
            self._publish_filled()

    def _publish_filled(self) -> None:
        filled, self._filled = self._filled, {}
        if not self.enable_prefix_caching:
            return
        slots, indices, sequences = [], [], []
        for slot, num_full in filled.items():
            sequence = self.residents[slot]
            if len(sequence.hashes) == num_full - 1:
                slots.append(slot)
                indices.append(num_full - 1)
                sequences.append(sequence)
            else:  # the prompt filled the block to its end, or blocks are so small that there are several new ones
                self.publish(sequence, num_full)
        if not sequences:
            return
        parents = [sequence.hashes[-1] if sequence.hashes else sequence.root for sequence in sequences]
        hashes = self.hasher.next_hashes(parents, indices, self.slots.blocks(slots, indices))
        blocks = []
        for sequence, index, block_hash in zip(sequences, indices, hashes, strict=True):
            sequence.hashes.append(block_hash)
            blocks.append(sequence.blocks[index])
            sequence.num_published = index + 1
        self.pool.publish(blocks, hashes)

    def confirm(self, result: StepResult) -> InFlightStep | None:
        """The plan that `result` answers, which is no longer in flight; None for a result of an earlier epoch.

        Raises WrongResultError if it answers no plan or has a wrong number of tokens or of records.
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
        if (result.logprobs or self.num_asking) and len(result.logprobs) != num_record_bytes(expected, self.slots):
            raise WrongResultError(
                f"replica {self.index} sent {len(result.logprobs)} bytes of log-probabilities in step {result.step}, "
                f"the plan's rows asked for {num_record_bytes(expected, self.slots)}"
            )
        if (result.vectors or expected.prefills) and len(result.vectors) != num_vector_bytes(expected):
            raise WrongResultError(
                f"replica {self.index} sent {len(result.vectors)} bytes of vectors in step {result.step}, the plan's "
                f"rows asked for {num_vector_bytes(expected)}"
            )
        self.in_flight.popleft()
        self.pool.confirm(result.step)
        self.slots.confirm(result.step)
        return expected
