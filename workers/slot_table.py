"""A worker's mirror of the sequences it runs, one column per property, by slot.

`protos/worker.proto` states how a plan's differences are applied and which rows follow from them. Everything here
depends on counts, never on token values, so the host can prepare the next step while the device computes this one.
"""

from dataclasses import dataclass, field

import numpy as np

from manta.protos.worker_pb2 import SeqAdd, StepPlan
from manta.workers.columns import Ints, PlanError, decode_int32, decode_pairs, decode_uint32, grown
from manta.workers.limits import Limits
from manta.workers.pooled_prompt import PooledPrompt
from manta.workers.sampling_table import SamplingTable
from manta.workers.token_table import TokenTable


@dataclass(slots=True)
class SlotChanges:
    """What plans have changed since somebody last took it."""

    added: list[tuple[int, int, int]] = field(default_factory=list)  # slot, tokens known, tokens computed
    blocks: list[tuple[Ints, Ints, Ints]] = field(default_factory=list)  # slots, places in their tables, blocks

    def take(self) -> "SlotChanges":
        """All of it; nothing is left."""
        taken = SlotChanges(self.added, self.blocks)
        self.added, self.blocks = [], []
        return taken


@dataclass(frozen=True, slots=True)
class Rows:
    """The R rows of one step, decode rows first."""

    slots: Ints  # int64 [R]
    starts: Ints  # int64 [R]: position of the first token that is computed
    num_tokens: Ints  # int64 [R]: tokens that are computed
    sampled: Ints  # int64 [N]: the rows that sample a token, ascending
    num_decodes: int  # rows 0 : num_decodes compute one token and sample one

    @property
    def seq_lens(self) -> Ints:
        """int64 [R]: tokens of each row's sequence whose KV exists after the step."""
        return self.starts + self.num_tokens

    @property
    def sampled_slots(self) -> Ints:
        """int64 [N]"""
        return self.slots[self.sampled]

    @property
    def sampled_positions(self) -> Ints:
        """int64 [N]: where the sampled tokens go in their sequences."""
        return self.seq_lens[self.sampled]

    @property
    def only_decode(self) -> bool:
        """Whether every row computes one token and samples one."""
        return self.num_decodes == self.slots.size


class SlotTable:
    """Slots, their sequences and block tables. The only writer of its columns; read them, do not change them.

    Columns grow with the highest slot in use. `block_table` is int32 [slots, blocks], padded with 0. Prompts that
    become vectors are in `pooled`, by slot; their `length` is one more than they have tokens, so that no row reaches it
    and samples, here or on the device.
    """

    def __init__(
        self, limits: Limits, tokens: TokenTable, sampling: SamplingTable, changes: SlotChanges | None = None
    ) -> None:
        """`changes` are noted for whoever keeps a copy of the columns."""
        self._limits = limits
        self._tokens = tokens
        self._sampling = sampling
        self._changes = changes
        self.pooled: dict[int, PooledPrompt] = {}
        self.clear()

    def clear(self) -> None:
        """Frees every slot."""
        if self._changes is not None:
            self._changes.take()  # those of a plan that could not be followed
        self._sampling.clear()
        self.pooled.clear()
        self.in_use = np.zeros(16, np.bool_)
        self.decoding = np.zeros(16, np.bool_)
        self.lane = np.zeros(16, np.int64)
        self.length = np.zeros(16, np.int64)
        self.num_computed = np.zeros(16, np.int64)
        self.max_length = np.zeros(16, np.int64)
        self.num_blocks = np.zeros(16, np.int64)
        self.block_table = np.zeros((16, min(16, self._limits.max_blocks_per_seq)), np.int32)

    def apply(self, plan: StepPlan) -> Rows:
        """Applies the plan's differences and returns its rows; the columns then stand as after the step.

        Raises PlanError; the table is then half changed and good for nothing but `clear`.
        """
        try:
            self._free(decode_uint32(plan.frees, "frees"))
            for add in plan.adds:
                self._add(add)
            self._grow(decode_pairs(plan.grow, "grow"))
            rows = self._rows(plan)
        except PlanError as error:
            raise PlanError(f"step {plan.step}: {error}") from None
        self._advance(rows)
        return rows

    def _free(self, slots: Ints) -> None:
        if not slots.size:
            return
        self._check_in_use(slots, "frees")
        if np.unique(slots).size != slots.size:
            raise PlanError(f"frees names a slot twice: {slots.tolist()}")
        self.in_use[slots] = False
        self.decoding[slots] = False
        self._sampling.free(slots)
        if self.pooled:
            for slot in slots.tolist():
                self.pooled.pop(slot, None)

    def _add(self, add: SeqAdd) -> None:
        slot, limits = add.slot, self._limits
        tokens = decode_int32(add.tokens, f"slot {slot}: tokens")
        blocks = decode_uint32(add.blocks, f"slot {slot}: blocks")
        self._reserve(slot)
        if self.in_use[slot]:
            raise PlanError(f"slot {slot} is added but in use")
        pools = add.HasField("pooling")
        grows = tokens.size < add.max_length
        if not 0 < add.num_prompt_tokens <= tokens.size <= add.max_length <= limits.max_model_len or grows == pools:
            raise PlanError(
                f"slot {slot}: {add.num_prompt_tokens} prompt tokens among {tokens.size} tokens growing to "
                f"{add.max_length} do not fit each other or the {limits.max_model_len} of the model"
            )
        if tokens.min() < 0 or tokens.max() >= limits.vocab_size:
            raise PlanError(f"slot {slot}: a token id lies outside the vocabulary of {limits.vocab_size}")
        if not add.num_computed < tokens.size or add.num_computed > blocks.size * limits.block_size:
            raise PlanError(
                f"slot {slot}: {add.num_computed} computed of {tokens.size} tokens, with {blocks.size} blocks"
            )
        if pools:
            self.pooled[slot] = PooledPrompt.of(slot, add.pooling, tokens.size, add.num_computed)
        self.in_use[slot] = True
        self.lane[slot] = add.lane
        length = self.length[slot] = tokens.size + pools
        self.num_computed[slot] = add.num_computed
        self.max_length[slot] = add.max_length
        self.num_blocks[slot] = 0
        self.block_table[slot] = 0
        if self._changes is not None:
            self._changes.added.append((slot, length, add.num_computed))
        self._append_blocks(np.full(blocks.size, slot), blocks)
        self._tokens.reserve(slot + 1, tokens.size)
        self._tokens.write(slot, tokens)
        self._sampling.set(slot, add.sampling, add.num_prompt_tokens)

    def _grow(self, pairs: Ints) -> None:
        if pairs.size:
            self._check_in_use(pairs[:, 0], "grow")
            self._append_blocks(pairs[:, 0], pairs[:, 1])

    def _append_blocks(self, slots: Ints, blocks: Ints) -> None:
        """Appends block i to the table of slots[i]; a slot may come several times."""
        if not slots.size:
            return
        outside = blocks >= self._limits.num_blocks
        if outside.any():
            raise PlanError(
                f"slot {slots[outside][0]}: block {blocks[outside][0]} lies outside the "
                f"{self._limits.num_blocks} blocks of this worker"
            )
        order = np.argsort(slots, kind="stable")
        slots, blocks = slots[order], blocks[order]
        nth_of_slot = np.arange(slots.size) - np.searchsorted(slots, slots)
        index = self.num_blocks[slots] + nth_of_slot
        widest = int(index.max()) + 1
        if widest > self._limits.max_blocks_per_seq:
            raise PlanError(
                f"slot {slots[index.argmax()]}: a table of {widest} blocks holds more than the "
                f"{self._limits.max_model_len} tokens of the model"
            )
        if widest > self.block_table.shape[1]:
            width = min(2 * widest, self._limits.max_blocks_per_seq)
            wider = np.zeros((self.block_table.shape[0], width), np.int32)
            wider[:, : self.block_table.shape[1]] = self.block_table
            self.block_table = wider
        self.block_table[slots, index] = blocks
        if self._changes is not None:
            self._changes.blocks.append((slots, index, blocks))
        self.num_blocks[slots] = index + 1  # the last of equal slots has the largest index and is written last

    def _rows(self, plan: StepPlan) -> Rows:
        runs = self.decoding & (self.lane == plan.lane) & (self.length < self.max_length)
        if plan.holds:
            holds = decode_uint32(plan.holds, "holds")
            self._check_in_use(holds, "holds")
            runs[holds] = False
        decodes = np.flatnonzero(runs)
        prefills = decode_uint32(plan.prefill_slots, "prefill_slots")
        prefill_lengths = decode_uint32(plan.prefill_lengths, "prefill_lengths")
        self._check_prefills(plan.lane, prefills, prefill_lengths)

        slots = np.concatenate([decodes, prefills])
        num_tokens = np.concatenate([np.ones(decodes.size, np.int64), prefill_lengths])
        starts = self.num_computed[slots]
        ends = starts + num_tokens
        self._check_step(slots, ends, num_tokens)
        return Rows(slots, starts, num_tokens, np.flatnonzero(ends == self.length[slots]), decodes.size)

    def _check_prefills(self, lane: int, slots: Ints, lengths: Ints) -> None:
        if slots.size != lengths.size:
            raise PlanError(f"{slots.size} prefill_slots but {lengths.size} prefill_lengths")
        if not slots.size:
            return
        self._check_in_use(slots, "prefill_slots")
        if np.unique(slots).size != slots.size:
            raise PlanError(f"prefill_slots names a slot twice: {slots.tolist()}")
        for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True):
            left = int(self.length[slot] - self.num_computed[slot]) - (slot in self.pooled)
            if self.lane[slot] != lane:
                raise PlanError(f"slot {slot} of lane {self.lane[slot]} is prefilled in a step of lane {lane}")
            if self.decoding[slot]:
                raise PlanError(f"slot {slot} is decoding and cannot be prefilled")
            if not 0 < length <= left:
                raise PlanError(f"slot {slot}: {length} tokens are to be computed of {left} that are left")

    def _check_step(self, slots: Ints, ends: Ints, num_tokens: Ints) -> None:
        uncovered = ends > self.num_blocks[slots] * self._limits.block_size
        if uncovered.any():
            slot = slots[uncovered][0]
            raise PlanError(
                f"slot {slot}: its {self.num_blocks[slot]} blocks do not cover a write up to token {ends[uncovered][0]}"
            )
        if num_tokens.sum() > self._limits.max_num_batched_tokens:
            raise PlanError(
                f"{num_tokens.sum()} tokens are more than max_num_batched_tokens={self._limits.max_num_batched_tokens}"
            )

    def _advance(self, rows: Rows) -> None:
        """The columns after the step: a row that sampled is one token longer and decodes from now on."""
        self.num_computed[rows.slots] += rows.num_tokens
        if not rows.sampled.size:
            return
        sampled = rows.sampled_slots
        self.length[sampled] += 1
        self.decoding[sampled] = True
        self._tokens.reserve(0, int(self.length[sampled].max()))

    def _check_in_use(self, slots: Ints, what: str) -> None:
        known = slots < self.in_use.size
        unknown = slots[~known] if not known.all() else slots[~self.in_use[slots]]
        if unknown.size:
            raise PlanError(f"{what} names slot {unknown[0]}, which is not in use")

    def _reserve(self, slot: int) -> None:
        if slot >= self._limits.max_num_slots:
            raise PlanError(f"slot {slot} lies outside the {self._limits.max_num_slots} slots of this worker")
        if slot < self.in_use.size:
            return
        num_slots = slot + 1
        self.in_use = grown(self.in_use, num_slots)
        self.decoding = grown(self.decoding, num_slots)
        self.lane = grown(self.lane, num_slots)
        self.length = grown(self.length, num_slots)
        self.num_computed = grown(self.num_computed, num_slots)
        self.max_length = grown(self.max_length, num_slots)
        self.num_blocks = grown(self.num_blocks, num_slots)
        self.block_table = grown(self.block_table, num_slots)
