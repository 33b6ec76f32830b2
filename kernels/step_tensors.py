"""Slots on the device and a step's inputs built from them: shapes, and in plain torch what the GPU's kernels do."""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SlotColumns:
    """What a step reads of every slot. The same as the host's slot table, on the device."""

    length: Tensor  # int32 [slots]: tokens known
    num_computed: Tensor  # int32 [slots]: tokens whose KV exists
    block_table: Tensor  # int32 [slots, max_blocks]
    tokens: Tensor  # int32 [slots, max_length]: token ids


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Buffers for T tokens in R rows; a CUDA graph keeps them. Fewer of both may be in use: what is not there is token
    0 at position 0 whose KV goes nowhere (slot -1), in a row of length 0 whose block table is zeros."""

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    slot_mapping: Tensor  # int64 [T]: -1 where nothing is to be written
    seq_lens: Tensor  # int32 [R]
    block_tables: Tensor  # int32 [R, W], padded with 0
    last_tokens: Tensor  # int64 [R]: the index among the T tokens of each row's last one
    sampled_positions: Tensor  # int64 [R]: where the row's sampled token goes; -1 where the row samples none

    @classmethod
    def empty(cls, num_tokens: int, num_rows: int, num_blocks: int, device: torch.device) -> Self:
        """Buffers for so many tokens, rows, and blocks of a row."""
        shapes = {"seq_lens": num_rows, "last_tokens": num_rows, "sampled_positions": num_rows}
        tensors = {
            field.name: torch.zeros(
                (num_rows, num_blocks) if field.name == "block_tables" else (shapes.get(field.name, num_tokens),),
                dtype=torch.int32 if field.name in ("seq_lens", "block_tables") else torch.int64,
                device=device,
            )
            for field in fields(cls)
        }
        return cls(**tensors)


def build_inputs(columns: SlotColumns, slots: Tensor, query_start: Tensor, block_size: int, out: StepInputs) -> None:
    """Fills `out` for a step. slots: integer [R], -1 for rows that are not there; query_start: int32 [R + 1], row r
    computes tokens query_start[r] : query_start[r + 1], the next ones of its slot; T >= query_start[R] >= 0.

    A row whose last token is the last one known of its slot samples. W blocks must hold the longest row.
    """
    rows = torch.arange(slots.shape[0], device=slots.device)
    is_there = slots >= 0
    starts, ends = query_start[:-1].long(), query_start[1:].long()
    slot = slots.long().clamp(min=0)
    first = columns.num_computed[slot].long()

    index = torch.arange(out.token_ids.shape[0], device=slots.device)
    row = torch.searchsorted(ends, index, right=True).clamp(max=rows.numel() - 1)
    known = (index < ends[-1]) & is_there[row]
    position = torch.where(known, first[row] + index - starts[row], 0)
    block = columns.block_table[slot[row], position // block_size].long()
    out.positions.copy_(position)
    out.slot_mapping.copy_(torch.where(known, block * block_size + position % block_size, -1))
    out.token_ids.copy_(torch.where(known, columns.tokens[slot[row], position], 0))

    seq_lens = torch.where(is_there, first + ends - starts, 0)
    out.seq_lens.copy_(seq_lens)
    column = torch.arange(out.block_tables.shape[1], device=slots.device)
    has_column = column < columns.block_table.shape[1]
    table = columns.block_table[slot[:, None], column * has_column]
    out.block_tables.copy_(torch.where(column * block_size < seq_lens[:, None], table, 0))
    out.last_tokens.copy_((ends - 1).clamp(min=0))
    samples = is_there & (ends > starts) & (seq_lens == columns.length[slot])
    out.sampled_positions.copy_(torch.where(samples, seq_lens, -1))


def advance(columns: SlotColumns, slots: Tensor, query_start: Tensor, out: StepInputs, sampled: Tensor) -> None:
    """After the step: its tokens are computed, and the sampled ones (int64 [R], by row) are known, in place."""
    there = slots >= 0
    counts = (query_start[1:] - query_start[:-1])[there]
    columns.num_computed[slots[there].long()] += counts.to(torch.int32)
    samples = out.sampled_positions >= 0
    slot, position = slots[samples].long(), out.sampled_positions[samples]
    columns.tokens[slot, position] = sampled[samples].to(torch.int32)
    columns.length[slot] = (position + 1).to(torch.int32)
