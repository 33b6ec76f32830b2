"""One row's token by one GPU program, without sorting: the kernel that `sample_triton` launches.

The filters are cutoffs of weights, in the order min_p and top_k, then top_p on what they leave; ties with the last
token kept stay; the draw inverts the cumulative distribution in the order of token ids. With a filter, the tokens that
may be drawn are listed first, and where the list holds all of them, the searches and the draw read the list alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from manta.kernels.row_search_triton import (
    LOG2_E,
    collect,
    find_best,
    find_cutoff,
    store_columns,
    sum_from,
    weigh,
)
from manta.kernels.sampling_rows import FLOATS, INTS

_SLOT = tl.constexpr(INTS.index("slot"))
_POSITION = tl.constexpr(INTS.index("position"))
_SEED = tl.constexpr(INTS.index("seed"))
_TOP_K = tl.constexpr(INTS.index("top_k"))
_TEMPERATURE = tl.constexpr(FLOATS.index("temperature"))
_TOP_P = tl.constexpr(FLOATS.index("top_p"))
_MIN_P = tl.constexpr(FLOATS.index("min_p"))
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * tl.full((), _MIX_1, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full((), _MIX_2, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def uniform(seed, position):
    """The random number float64 in (0, 1) of a sequence's seed (int64 of the same bits) and a position, as everywhere
    in Manta: SplitMix64 (Steele et al. 2014) over both, of which 40 bits count, plus a half."""
    golden = tl.full((), _GOLDEN, tl.uint64)
    key = _mix(seed.to(tl.uint64, bitcast=True) + golden)
    bits = _mix(key + golden * position.to(tl.uint64, bitcast=True)) >> 24
    return (bits.to(tl.float64) + 0.5) * 9.094947017729282e-13  # 2 ** -40


@triton.jit
def _place(source, count, top, scale, cutoff, target, TILE: tl.constexpr):
    """The first place at which the weights whose bits are `cutoff` or more, summed from the first, exceed `target`."""
    column = tl.arange(0, TILE)
    before = target * 0
    found, last, start = -1, 0, 0
    while (start < count) & (found < 0):
        x = tl.load(source + start + column, mask=start + column < count, other=float("-inf"))
        weight = weigh(x, top, scale)
        kept = tl.where(weight.to(tl.int32, bitcast=True) >= cutoff, weight, 0.0).to(tl.float64)
        amount = tl.sum(kept, axis=0)
        if amount > 0:
            last = tl.max(tl.where(kept > 0, start + column, 0), axis=0)
            if before + amount > target:
                is_past = (before + tl.cumsum(kept, axis=0) > target) & (kept > 0)
                found = tl.minimum(tl.min(tl.where(is_past, start + column, count), axis=0), last)
        before += amount
        start += TILE
    return tl.where(found < 0, last, found)


@triton.jit
def _draw(source, count, top, scale, top_k, top_p, lowest, row_total, draw, TILE: tl.constexpr):
    """The place in the source of the token drawn. lowest: min_p's bits; row_total: the sum of all weights of the row
    where top_p alone filters, else below 0."""
    cutoff, total = lowest, row_total
    for turn in range(2):
        by_count = turn == 0
        if (by_count & (top_k > 0)) | ((turn == 1) & (top_p < 1.0)):
            target = tl.where(by_count, top_k.to(tl.float64), top_p * total)
            cutoff = find_cutoff(source, count, top, scale, target, cutoff, by_count, TILE)
        if (turn == 1) | ((row_total < 0) & (top_p < 1.0)):
            total = sum_from(source, count, top, scale, cutoff, TILE)
    return _place(source, count, top, scale, cutoff, draw * total, TILE)


@triton.jit
def _list_kept(row, vocab_size, best, top, scale, top_k, top_p, lowest, row_total, values, ids, TILE: tl.constexpr):
    """Lists the tokens that may be drawn, and perhaps some more; returns how many, TILE + 1 where none were listed."""
    bound = lowest
    if (top_k > 0) | (row_total >= 0):
        store_columns(best, values, TILE)
        target = tl.where(top_k > 0, top_k.to(tl.float64), top_p * row_total)
        # Of the columns' maxima alone: no more than of all tokens, so this cutoff is no higher than theirs.
        bound = find_cutoff(values, tl.full((), TILE, tl.int32), top, scale, target, lowest, top_k > 0, TILE)
        tl.debug_barrier()
    length = tl.full((), TILE + 1, tl.int32)
    if bound > 0:
        length = collect(row, vocab_size, top, scale, bound, values, ids, TILE)
    return length


@triton.jit(do_not_specialize=["floats_stride", "ints_stride"])
def sample_kernel(
    logits, stride, floats, floats_stride, ints, ints_stride, list_values, list_ids, out,
    VOCAB_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(ints + _SLOT * ints_stride + row) < 0:
        tl.store(out + row, tl.zeros((), tl.int64))
        return
    logits += row * stride
    vocab_size = tl.full((), VOCAB_SIZE, tl.int32)
    best, best_at, has_nan = find_best(logits, vocab_size, TILE)
    top = tl.max(best, axis=0)
    temperature = tl.load(floats + _TEMPERATURE * floats_stride + row)
    token = tl.min(tl.where(best == top, best_at, VOCAB_SIZE - 1), axis=0)
    if temperature > 0:
        if has_nan | (tl.abs(top) == float("inf")):
            token = tl.full((), VOCAB_SIZE - 1, tl.int32)
        else:
            scale = LOG2_E / temperature
            top_k = tl.load(ints + _TOP_K * ints_stride + row)
            top_p = tl.load(floats + _TOP_P * floats_stride + row)
            lowest = tl.load(floats + _MIN_P * floats_stride + row).to(tl.int32, bitcast=True)
            draw = uniform(tl.load(ints + _SEED * ints_stride + row), tl.load(ints + _POSITION * ints_stride + row))
            values, ids = list_values + row * TILE, list_ids + row * TILE
            row_total = tl.full((), -1.0, tl.float64)
            if (top_k == 0) & (lowest == 0) & (top_p < 1.0):
                row_total = sum_from(logits, vocab_size, top, scale, lowest, TILE)
            length = _list_kept(
                logits, vocab_size, best, top, scale, top_k, top_p, lowest, row_total, values, ids, TILE
            )
            if length <= TILE:
                token = tl.load(ids + _draw(values, length, top, scale, top_k, top_p, lowest, row_total, draw, TILE))
            else:
                token = _draw(logits, vocab_size, top, scale, top_k, top_p, lowest, row_total, draw, TILE)
    tl.store(out + row, token.to(tl.int64))
