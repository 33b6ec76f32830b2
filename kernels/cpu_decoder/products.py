"""x @ weight.T by the threads of a step: weights in panels of 32 outputs.

Each panel is read from memory once per BLOCK_ROWS rows, which stay in the second-level cache.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from manta.kernels.cpu_decoder.fetch import LINE_BYTES, fetch_lines
from manta.kernels.cpu_decoder.threads import atomic_add
from manta.kernels.cpu_decoder.tiles import COLUMNS, LANES, MAX_ROWS, multiply_tile, widen_panel
from manta.kernels.cpu_decoder.vectors import copy_past_caches, silu_mul_row
from manta.kernels.cpu_scalars import is_paired, item_bytes, jit, load, load_int64, store, store_int64

BLOCK_ROWS = 21 * 12  # of x: about 600 KB for 576 inputs

AHEAD_BYTES = 2048  # between a fetch of weights and their use: about what a read from memory takes
SEGMENT_BYTES = 64  # a cache line for the one address that tiles read
WIDE_HALF_K = 96  # pairs of rows of a panel that are widened at a time: 24 KiB, in the first-level cache
MIN_WIDE_ROWS = 10 * 12  # for fewer, widening apart saves nothing (measured: 0.95 at 64 rows, 1.0 to 1.06 from 128 on)
MIN_STREAMED_ROWS = 500  # outputs of so many outgrow the second-level cache: 1.03 at 2,048 rows, 1.01 at 512
MIN_COUNTED_ROWS = 16  # for fewer, weights are read as fast as memory gives them, best in one go
SCRATCH_BYTES = SEGMENT_BYTES + 4 * (BLOCK_ROWS + MAX_ROWS + 2 * WIDE_HALF_K) * COLUMNS

STORE, ADD, SILU_MUL = 0, 1, 2  # what becomes of a product: see multiply

F32 = np.float32(0)


def pack_weight(weight: Tensor) -> Tensor:
    """[out, in] -> panels of 32 outputs as tiles read them: bfloat16 [ceil(out / 32), ceil(in / 2), 32, 2], others
    [ceil(out / 32), ceil(in / 2) * 2, 32]; padded with zeros."""
    num_out, num_in = weight.shape
    panels, half_k = -(-num_out // COLUMNS), -(-num_in // 2)
    if weight.shape != (panels * COLUMNS, half_k * 2):
        padded = weight.new_zeros(panels * COLUMNS, half_k * 2)
        padded[:num_out, :num_in] = weight
        weight = padded
    if weight.dtype == torch.bfloat16:
        return weight.view(panels, COLUMNS, half_k, 2).permute(0, 2, 1, 3).contiguous()
    return weight.view(panels, COLUMNS, half_k * 2).permute(0, 2, 1).contiguous()


def interleave(gate_up: Tensor) -> Tensor:
    """[2 * size, ...], gate first -> the same rows so that every panel holds 16 gates and their 16 ups, zero-padded."""
    gate, up = gate_up.chunk(2)
    size = gate.shape[0]
    groups = -(-size // LANES)
    out = gate_up.new_zeros(groups, 2, LANES, *gate_up.shape[1:])
    for part, rows in enumerate((gate, up)):
        padded = gate_up.new_zeros(groups * LANES, *gate_up.shape[1:])
        padded[:size] = rows
        out[:, part] = padded.view(groups, LANES, *gate_up.shape[1:])
    return out.view(groups * 2 * LANES, *gate_up.shape[1:])


@jit()
def _finish(
    rows: Any, panel: Any, scratch: Any, bias: Any, num_out: Any, out: Any, at: Any, out_stride: Any, mode: Any,
    is_streamed: Any, left: Any,
) -> None:  # fmt: skip
    """Takes a block of sums [rows, 32] to the output, whose first row begins at element `at`."""
    if bias != 0:
        num_columns = COLUMNS if mode == SILU_MUL else min(COLUMNS, num_out - panel * COLUMNS)
        for r in range(rows):
            for j in range(num_columns):
                value = load(scratch, r * COLUMNS + j, F32) + load(bias, panel * COLUMNS + j, F32)
                store(scratch, r * COLUMNS + j, value, F32)
    width = LANES if mode == SILU_MUL else COLUMNS
    if is_streamed and num_out - panel * width >= width:
        for r in range(rows):
            sums = scratch + 4 * r * COLUMNS
            if mode == SILU_MUL:
                silu_mul_row(sums, sums + 4 * LANES)
            copy_past_caches(sums, out + 4 * (at + r * out_stride + panel * width), width // LANES)
        return
    if mode == SILU_MUL:
        first = panel * LANES
        count = min(LANES, num_out - first)
        for r in range(rows):
            gate = scratch + 4 * r * COLUMNS
            silu_mul_row(gate, gate + 4 * LANES)
            for j in range(count):
                store(out, at + r * out_stride + first + j, load(gate, j, F32), left)
        return
    first = panel * COLUMNS
    count = min(COLUMNS, num_out - first)
    for r in range(rows):
        row_at = at + r * out_stride + first
        if mode == ADD:
            for j in range(count):
                store(out, row_at + j, load(out, row_at + j, F32) + load(scratch, r * COLUMNS + j, F32), F32)
        else:
            for j in range(count):
                store(out, row_at + j, load(scratch, r * COLUMNS + j, F32), F32)


@jit()
def _multiply_unit(
    x: Any, x_stride: Any, rows: Any, half_k: Any, weight: Any, following: Any, panel: Any, bias: Any, num_out: Any,
    out: Any, at: Any, out_stride: Any, mode: Any, is_streamed: Any, scratch: Any, left: Any, kind: Any,
) -> None:  # fmt: skip
    """One panel for a block of rows. Many rows take it in parts, each widened to float32 once, not once for every
    MAX_ROWS, while the next part (after the last, of the panel at `following`) is fetched. Each sum is over k in the
    same order.
    """
    step = 2 * COLUMNS * item_bytes(kind)
    second = step // 2 if is_paired(kind) else step // 4  # where in a pair of rows the second 16 columns begin
    sums = scratch + SEGMENT_BYTES
    wide = sums + 4 * (BLOCK_ROWS + MAX_ROWS) * COLUMNS
    is_wide = item_bytes(left) == 4 and item_bytes(kind) == 2 and rows >= MIN_WIDE_ROWS
    part = WIDE_HALF_K if is_wide else half_k
    tile_lines = part * step // (LINE_BYTES * ((rows + MAX_ROWS - 1) // MAX_ROWS)) + 1
    for first in range(0, half_k, part):
        count = min(part, half_k - first)
        is_last = first + count == half_k
        next_part = following if is_last else weight + (first + count) * step
        if is_wide:
            widen_panel(weight + first * step, count, step, second, wide, kind)
        store_int64(scratch, 0, wide if is_wide else weight)
        for r in range(0, rows, MAX_ROWS):
            tile, tile_sums = min(MAX_ROWS, rows - r), sums + 4 * r * COLUMNS
            if is_wide:
                fetch_lines(next_part + r // MAX_ROWS * tile_lines * LINE_BYTES, tile_lines)
                multiply_tile(
                    tile, x + 4 * (r * x_stride + 2 * first), x_stride, scratch, 1, 0, 4 * LANES, 8 * COLUMNS, count, 0,
                    tile_sums, COLUMNS, first, F32, F32,
                )  # fmt: skip
            else:
                multiply_tile(
                    tile, x + item_bytes(left) * r * x_stride, x_stride, scratch, 1, 0, second, step, half_k,
                    AHEAD_BYTES, tile_sums, COLUMNS, 0, left, kind,
                )  # fmt: skip
            if is_last:  # at once: what it writes goes to memory while the next tile is computed
                _finish(
                    tile, panel, tile_sums, bias, num_out, out, at + r * out_stride, out_stride, mode, is_streamed, left
                )  # fmt: skip


def multiply(
    thread: Any, threads: Any, x: Any, x_stride: Any, rows: Any, num_in: Any, linear: Any, num_out: Any, out: Any,
    out_stride: Any, mode: Any, scratch: Any, counter: Any, left: Any, kind: Any,
) -> None:  # fmt: skip
    """This thread's part of out [rows, num_out] from x [rows, num_in] @ weight.T + bias.

    STORE writes it, ADD adds to what is there, SILU_MUL writes silu(gate) * up of an interleaved weight of 2 * num_out
    rows. x: address of elements of kind `left`, with room for MAX_ROWS more rows and zeros up to an even num_in; out:
    of float32, after SILU_MUL of `left`; strides in elements. linear: address of two int64s, the addresses of packed
    weight and float32 bias (or 0). scratch: SCRATCH_BYTES of the thread's own. counter: address of an int64 that is 0
    when the first thread comes; many rows are handed out by it, because no two cores of a shared host are as fast.
    """
    weight, bias = load_int64(linear, 0), load_int64(linear, 1)
    half_k = (num_in + 1) // 2
    panel_bytes = half_k * 2 * COLUMNS * item_bytes(kind)
    panels = (num_out + LANES - 1) // LANES if mode == SILU_MUL else (num_out + COLUMNS - 1) // COLUMNS
    blocks = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    block_rows = ((rows + blocks - 1) // blocks + MAX_ROWS - 1) // MAX_ROWS * MAX_ROWS
    units = blocks * panels
    is_counted = rows >= MIN_COUNTED_ROWS
    is_aligned = out % (4 * LANES) == 0 and out_stride % LANES == 0
    is_streamed = rows >= MIN_STREAMED_ROWS and is_aligned and mode != ADD and (mode == STORE or item_bytes(left) == 4)
    unit = atomic_add(counter, 1) if is_counted else units * thread // threads
    end_unit = units if is_counted else units * (thread + 1) // threads
    while unit < end_unit:
        likely_next = unit + threads if is_counted else unit + 1
        row = unit // panels * block_rows
        _multiply_unit(
            x + item_bytes(left) * row * x_stride, x_stride, min(block_rows, rows - row), half_k,
            weight + unit % panels * panel_bytes, weight + likely_next % panels * panel_bytes, unit % panels, bias,
            num_out, out, row * out_stride, out_stride, mode, is_streamed, scratch, left, kind,
        )  # fmt: skip
        unit = atomic_add(counter, 1) if is_counted else unit + 1
