"""A step's inputs, built on the GPU from the slots' columns: what each token is, where it sits and where its KV goes.

Some programs per row, and as many for what lies behind the last row: in a CUDA graph a step may have fewer tokens
and rows than it was captured with. A row's programs share its tokens and the entries of its block table.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl
from torch import Tensor

from manta.kernels.step_tensors import SlotColumns, StepInputs

BLOCK = 256
MAX_COLUMNS = 32


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "width"])
def _inputs_kernel(
    slots, query_start, length, num_computed, block_table, tokens, table_stride, tokens_stride,
    token_ids, positions, slot_mapping, seq_lens, row_tables, row_table_stride, last_tokens, sampled_positions,
    num_rows, num_tokens, width, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(query_start + row)
    slot = tl.full((), -1, tl.int64)
    end = num_tokens
    if row < num_rows:
        slot = tl.load(slots + row).to(tl.int64)
        end = tl.load(query_start + row + 1)
    is_there = slot >= 0
    slot = tl.maximum(slot, 0)
    first = tl.load(num_computed + slot, mask=is_there, other=0)
    for start in range(begin + tl.program_id(1) * BLOCK, end, tl.num_programs(1) * BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < end
        known = inside & is_there
        position = tl.where(known, first + token - begin, 0)
        block = tl.load(block_table + slot * table_stride + position // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
        kv_slot = tl.where(known, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
        token_id = tl.load(tokens + slot * tokens_stride + position, mask=known, other=0)
        tl.store(token_ids + token, token_id.to(tl.int64), mask=inside)
        tl.store(positions + token, position.to(tl.int64), mask=inside)
        tl.store(slot_mapping + token, kv_slot, mask=inside)
    if row < num_rows:
        seq_len = tl.where(is_there, first + end - begin, 0)
        num_blocks = tl.minimum((seq_len + BLOCK_SIZE - 1) // BLOCK_SIZE, width)
        for start in range(tl.program_id(1) * BLOCK, width, tl.num_programs(1) * BLOCK):
            column = start + tl.arange(0, BLOCK)
            block = tl.load(block_table + slot * table_stride + column, mask=column < num_blocks, other=0)
            tl.store(row_tables + row * row_table_stride + column, block, mask=column < width)
        if tl.program_id(1) == 0:
            samples = is_there & (end > begin) & (seq_len == tl.load(length + slot))
            tl.store(seq_lens + row, seq_len)
            tl.store(last_tokens + row, tl.maximum(end - 1, 0).to(tl.int64))
            tl.store(sampled_positions + row, tl.where(samples, seq_len, -1).to(tl.int64))


@triton.jit
def _advance_kernel(slots, query_start, sampled_positions, sampled, length, num_computed, tokens, tokens_stride):
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        return
    count = tl.load(query_start + row + 1) - tl.load(query_start + row)
    tl.store(num_computed + slot, tl.load(num_computed + slot) + count)
    position = tl.load(sampled_positions + row)
    if position >= 0:
        tl.store(tokens + slot * tokens_stride + position, tl.load(sampled + row).to(tl.int32))
        tl.store(length + slot, (position + 1).to(tl.int32))


def build_inputs(columns: SlotColumns, slots: Tensor, query_start: Tensor, block_size: int, out: StepInputs) -> None:
    """As `step_tensors.build_inputs`, in one launch."""
    num_rows, width = out.block_tables.shape
    num_tokens = out.token_ids.shape[0]
    assert slots.shape == out.seq_lens.shape == (num_rows,)
    assert query_start.shape == (num_rows + 1,)
    assert columns.block_table.stride(1) == columns.tokens.stride(1) == out.block_tables.stride(1) == 1
    grid = (num_rows + 1, min(max(triton.cdiv(max(num_tokens, width), 4 * BLOCK), 1), MAX_COLUMNS))
    _inputs_kernel[grid](
        slots, query_start, columns.length, columns.num_computed, columns.block_table, columns.tokens,
        columns.block_table.stride(0), columns.tokens.stride(0), out.token_ids, out.positions, out.slot_mapping,
        out.seq_lens, out.block_tables, out.block_tables.stride(0), out.last_tokens, out.sampled_positions,
        num_rows, num_tokens, width, BLOCK_SIZE=block_size, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def advance(columns: SlotColumns, slots: Tensor, query_start: Tensor, out: StepInputs, sampled: Tensor) -> None:
    """As `step_tensors.advance`, in one launch."""
    _advance_kernel[(slots.shape[0],)](
        slots, query_start, out.sampled_positions, sampled, columns.length, columns.num_computed, columns.tokens,
        columns.tokens.stride(0), num_warps=1,
    )  # fmt: skip
