"""A worker without a device: keeps real paged memory, follows plans exactly as worker.proto says, and refuses wrong
ones. Its "KV" of a token is a number that depends on every token before it and on `sampling` (stand-in for weights,
adapter and all), and the token it samples depends on all KV it reads through the block table. A block that is shared
wrongly, reused too early or not covered therefore changes what it says, if it is not refused outright.
"""

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manta.scheduler.types import Capacity, SeqAdd, StepPlan, StepResult

UNWRITTEN = -1


@dataclass(frozen=True, slots=True)
class Asking:
    """What stands for the sampling of a request that asks for log-probabilities. KV depends on the adapter alone."""

    adapter: str = ""
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    searches: bool = False  # its records are those of `search_record`


def record(position: int, token: int, num_best: int | None) -> bytes:
    """What the fake worker says of the token at a position: no log-probability, but nobody should look at it."""
    return b"" if num_best is None else np.array([position, token] + [position * token] * 2 * num_best, "<i4").tobytes()


_MODULUS = (1 << 31) - 1


def search_record(kv: NDArray[np.int64], vocab_size: int, num_best: int) -> bytes:
    """As worker.proto has it: the log-probabilities of a made-up distribution of the token after those whose KV is
    int64 [num_tokens]."""
    logits = np.random.default_rng(_digest(kv)).normal(0.0, 2.0, vocab_size)
    logprobs = (logits - np.log(np.exp(logits).sum())).astype("<f4")
    best = np.argsort(-logprobs)[:num_best].astype("<i4")
    return b"".join([bytes(8), best.tobytes(), logprobs[best].tobytes()])


class WrongPlanError(AssertionError):
    """The plan breaks the protocol; the message says how."""


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise WrongPlanError(message)


def kv_root(sampling: Any) -> int:
    """The state before the first token."""
    key = sampling.adapter if isinstance(sampling, Asking) else sampling
    return sum((i + 1) * byte for i, byte in enumerate(repr(key).encode())) % _MODULUS


def next_kv(previous: int, token: int, position: int) -> int:
    return (previous * 31 + token * 7919 + position * 101 + 17) % _MODULUS


def sample(kv: NDArray[np.int64], vocab_size: int) -> int:
    """The token after those whose KV is int64 [num_tokens]."""
    return _digest(kv) % vocab_size


def _digest(kv: NDArray[np.int64]) -> int:
    return int((kv * (np.arange(len(kv)) % 97 + 1)).sum() % _MODULUS)


def vector(kind: str, kv: NDArray[np.int64]) -> bytes:
    """What a prompt whose KV is int64 [num_tokens] becomes: of all of it, or of what is read for its last token."""
    return np.array([kv.sum() if kind == "mean" else _digest(kv)], "<i8").tobytes()


def kv_alone(tokens: NDArray[np.int32], sampling: Any) -> NDArray[np.int64]:
    """int64 [num_tokens]: the KV of the tokens, without pages."""
    kv: list[int] = []
    state = kv_root(sampling)
    for position, token in enumerate(tokens.tolist()):
        state = next_kv(state, token, position)
        kv.append(state)
    return np.array(kv, np.int64)


def generate_alone(prompt: NDArray[np.int32], num_tokens: int, sampling: Any, vocab_size: int) -> list[int]:
    """What a request gets when nothing else runs: the same arithmetic without pages, plans or batches."""
    tokens: list[int] = prompt.tolist()
    kv: list[int] = []
    state = kv_root(sampling)
    for position in range(len(prompt) + num_tokens - 1):
        state = next_kv(state, tokens[position], position)
        kv.append(state)
        if position >= len(prompt) - 1:
            tokens.append(sample(np.array(kv, np.int64), vocab_size))
    return tokens[len(prompt) :]


@dataclass(slots=True)
class _Slot:
    lane: int
    tokens: list[int]
    num_computed: int
    max_length: int
    blocks: list[int]
    sampling: Any
    num_prompt_tokens: int
    pooling: str | None = None  # "mean" needs all that is computed, "last" does not
    decoding: bool = False
    computed: list[int] = field(default_factory=list)  # KV of the tokens computed in this stay


@dataclass(slots=True)
class _Unanswered:
    result: StepResult
    slots: set[int]
    blocks: set[int]  # that the step reads, writes or copies to
    sources: set[int]  # that it copies from, before it writes


class FakeWorker:
    """`submit` runs a plan at once but keeps the answer; `deliver` gives answers in order, as late as one likes."""

    def __init__(self, capacity: Capacity, vocab_size: int = 50, enable_chunked_prefill: bool = True) -> None:
        self.capacity = capacity
        self.vocab_size = vocab_size
        self.enable_chunked_prefill = enable_chunked_prefill
        self.epoch = 1
        self.num_computed_tokens = 0
        self._clear()

    def _clear(self) -> None:
        self.step = 0
        self.slots: dict[int, _Slot] = {}
        self.kv = np.full((self.capacity.num_blocks, self.capacity.block_size), UNWRITTEN, np.int64)
        self.readers: Counter[int] = Counter()  # block -> tables it is in
        self.new_readers: Counter[int] = Counter()  # block -> tables that this step adds with it as computed
        self.unanswered: deque[_Unanswered] = deque()
        self.taken: set[int] = set()  # blocks that came from elsewhere since the last plan

    @property
    def num_in_flight(self) -> int:
        return len(self.unanswered)

    def deliver(self) -> StepResult:
        """The oldest answer not given yet."""
        return self.unanswered.popleft().result

    def submit(self, plan: StepPlan) -> None:
        """Applies the plan's differences and runs its rows. Raises WrongPlanError."""
        expect(plan.epoch >= self.epoch, f"epoch {plan.epoch} after {self.epoch}")
        if plan.epoch > self.epoch:
            self.epoch = plan.epoch
            self._clear()
        expect(plan.step == self.step + 1, f"step {plan.step} after {self.step}")
        expect(0 <= plan.lane < self.capacity.num_lanes, f"lane {plan.lane} of {self.capacity.num_lanes}")
        expect(len(self.unanswered) < self.capacity.max_in_flight, "too many plans in flight")
        self.step += 1
        for slot in plan.frees:
            self._free(slot)
        for block in self.taken:
            expect(self.readers[block] == 0, f"block {block} was copied to from elsewhere and is in a table")
        self.taken.clear()
        self.new_readers.clear()
        for add in plan.adds:
            self._add(add)
        for slot, block in plan.grow:
            self._grow(slot, block)
        self._copy(plan.copies)
        decodes = self._decode_rows(plan)
        self._check_prefills(plan)
        num_tokens = len(decodes) + sum(count for _, count in plan.prefill)
        expect(num_tokens > 0, "an empty step")
        expect(plan.num_decodes == len(decodes), f"num_decodes is {plan.num_decodes}, there are {len(decodes)}")
        expect(plan.num_tokens == num_tokens, f"num_tokens is {plan.num_tokens}, rows have {num_tokens}")
        expect(num_tokens <= self.capacity.max_num_batched_tokens, f"{num_tokens} tokens exceed the budget")
        self._run(plan, decodes)

    def take_block(self, epoch: int, block: int, kv: NDArray[np.int64]) -> None:
        """Another worker's block, int64 [block_size], comes here; that of a past epoch is refused. Raises
        WrongPlanError if somebody may use its place."""
        if epoch < self.epoch:
            return
        if epoch > self.epoch:  # before its first plan
            self.epoch = epoch
            self._clear()
        expect(0 <= block < self.capacity.num_blocks, f"block {block} does not exist")
        self.taken.add(block)
        for step in self.unanswered:
            touched = block in step.blocks or block in step.sources
            expect(not touched, f"block {block} is copied to from elsewhere, step {step.result.step} uses it")
        self.kv[block] = kv

    def _run(self, plan: StepPlan, decodes: list[int]) -> None:
        rows = [(slot, 1) for slot in decodes] + plan.prefill
        written = {destination for _, destination in plan.copies}
        touched = written.union(*(self.slots[slot].blocks for slot, _ in rows))
        self.logprobs = self.vectors = b""
        sampled = [token for slot, count in rows if (token := self._compute(slot, count)) is not None]
        result = StepResult(plan.epoch, plan.step, np.array(sampled, np.int32), self.logprobs, self.vectors)
        sources = {source for source, _ in plan.copies}
        self.unanswered.append(_Unanswered(result, {slot for slot, _ in rows}, touched, sources))

    def _at(self, slot: int) -> _Slot:
        expect(slot in self.slots, f"slot {slot} is unknown")
        return self.slots[slot]

    def _free(self, slot: int) -> None:
        self.readers.subtract(self._at(slot).blocks)
        del self.slots[slot]

    def _add(self, add: SeqAdd) -> None:
        expect(0 <= add.slot < self.capacity.max_num_seqs, f"slot {add.slot} does not exist")
        expect(add.slot not in self.slots, f"slot {add.slot} is taken twice")
        expect(all(add.slot not in step.slots for step in self.unanswered), f"slot {add.slot} is still in flight")
        expect(0 <= add.lane < self.capacity.num_lanes, f"slot {add.slot} joins lane {add.lane}")
        num_tokens = len(add.tokens)
        expect(0 <= add.num_computed < num_tokens, f"slot {add.slot}: {add.num_computed} of {num_tokens} are computed")
        least = num_tokens + (add.pooling is None)
        most = num_tokens if add.pooling is not None else self.capacity.max_model_len
        expect(least <= add.max_length <= most, f"slot {add.slot} may grow to {add.max_length}")
        expect(add.pooling != "mean" or not add.num_computed, f"slot {add.slot} begins with tokens it needs")
        expect(0 < add.num_prompt_tokens <= num_tokens, f"slot {add.slot} has a prompt of {add.num_prompt_tokens}")
        expect(len(set(add.blocks)) == len(add.blocks), f"slot {add.slot} has a block twice")
        # Leading full blocks may be shared: all of their content is there, or an earlier row of this step writes it.
        # The others are this slot's alone. Of the first of them a part may be there: it is copied to, or goes on where
        # a slot that is freed left off, and then others may have been told to copy from it.
        num_shared, num_there = divmod(add.num_computed, self.capacity.block_size)
        for index, block in enumerate(add.blocks[num_shared:]):
            self._expect_new(add.slot, block, goes_on=index == 0 and num_there > 0)
        self.slots[add.slot] = _Slot(
            add.lane,
            add.tokens.tolist(),
            add.num_computed,
            add.max_length,
            list(add.blocks),
            add.sampling,
            add.num_prompt_tokens,
            add.pooling,
        )
        self.readers.update(add.blocks)
        self.new_readers.update(add.blocks[:num_shared])

    def _grow(self, slot: int, block: int) -> None:
        state = self._at(slot)
        expect(state.decoding, f"slot {slot} grows and does not decode")
        self._expect_new(slot, block)
        state.blocks.append(block)
        self.readers[block] += 1

    def _expect_new(self, slot: int, block: int, goes_on: bool = False) -> None:
        expect(0 <= block < self.capacity.num_blocks, f"block {block} does not exist")
        expect(self.readers[block] == 0, f"block {block} is given to slot {slot} and is in another table")
        for step in self.unanswered:
            touched = block in step.blocks or (block in step.sources and not goes_on)
            expect(not touched, f"block {block} is given to slot {slot}, step {step.result.step} uses it")

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        for source, destination in copies:
            # Others may read it already whose tables begin with it: a row of this step fills it first.
            num_owners = self.readers[destination] - self.new_readers[destination]
            expect(num_owners == 1, f"block {destination} is copied to and in {num_owners} tables")
            self.kv[destination] = self.kv[source]

    def _decode_rows(self, plan: StepPlan) -> list[int]:
        rows = []
        for slot in sorted(self.slots):
            state = self.slots[slot]
            if state.lane == plan.lane and state.decoding and len(state.tokens) < state.max_length:
                rows.append(slot)
        expect(len(set(plan.holds)) == len(plan.holds), "a slot is held twice")
        for slot in plan.holds:
            expect(slot in rows, f"slot {slot} is held and has no decode row in lane {plan.lane}")
        return [slot for slot in rows if slot not in plan.holds]

    def _check_prefills(self, plan: StepPlan) -> None:
        slots = [slot for slot, _ in plan.prefill]
        expect(len(set(slots)) == len(slots), "a slot has two prefill rows")
        for slot, count in plan.prefill:
            state = self._at(slot)
            rest = len(state.tokens) - state.num_computed
            expect(not state.decoding, f"slot {slot} has a prefill row and decodes")
            expect(state.lane == plan.lane, f"slot {slot} is in lane {state.lane}, the step in {plan.lane}")
            expect(1 <= count <= rest, f"slot {slot} computes {count} tokens, {rest} are left")
            whole = self.enable_chunked_prefill or rest > self.capacity.max_num_batched_tokens or state.num_computed > 0
            expect(whole or count == rest, f"slot {slot} computes {count} of {rest} tokens without chunked prefill")
        expect(all(add.slot in slots for add in plan.adds), "a sequence is added and not run")

    def _compute(self, slot: int, count: int) -> int | None:
        state, block_size = self.slots[slot], self.capacity.block_size
        end = state.num_computed + count
        expect(end <= len(state.blocks) * block_size, f"slot {slot}: {end} tokens in {len(state.blocks)} blocks")
        for position in range(state.num_computed, end):
            previous = self._read(slot, position - 1) if position else kv_root(state.sampling)
            block = state.blocks[position // block_size]
            num_others = self.readers[block] - self.new_readers[block] - 1
            expect(num_others == 0, f"slot {slot} writes to block {block}, which another slot reads")
            self.kv[block, position % block_size] = next_kv(previous, state.tokens[position], position)
            state.computed.append(next_kv(previous, state.tokens[position], position))
        asked = state.sampling if isinstance(state.sampling, Asking) else Asking()
        for position in range(state.num_computed + 1, min(end, state.num_prompt_tokens - 1) + 1):
            self.logprobs += record(position, state.tokens[position], asked.num_prompt_logprobs)
        state.num_computed = end
        self.num_computed_tokens += count
        if end < len(state.tokens):
            return None
        kv = self.kv[state.blocks].ravel()[:end]
        expect(bool((kv != UNWRITTEN).all()), f"slot {slot} reads KV that was never written")
        if state.pooling is not None:
            self.vectors += vector(state.pooling, np.array(state.computed) if state.pooling == "mean" else kv)
            return None
        token = sample(kv, self.vocab_size)
        state.tokens.append(token)
        state.decoding = True
        if asked.searches and asked.num_logprobs is not None:
            self.logprobs += search_record(kv, self.vocab_size, asked.num_logprobs)
        else:
            self.logprobs += record(end, token, asked.num_logprobs)
        return token

    def _read(self, slot: int, position: int) -> int:
        block_size = self.capacity.block_size
        kv = int(self.kv[self.slots[slot].blocks[position // block_size], position % block_size])
        expect(kv != UNWRITTEN, f"slot {slot} reads position {position}, which was never written")
        return kv
