"""Passes over one row of logits by one GPU program: its best token, the weight that a share of it reaches, a list of
its best tokens.

A weight is 2 ** ((x - top) * scale), so the best token's is 1 and the bits of weights, as int32, order as they do. A
`source` is a row of logits or a list of some of them; sums have an order that depends on the source alone. The bound of
a list comes without a pass of its own: the greatest logit of each column of tiles is in registers, and k columns that
reach a logit are k tokens that do.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

TILE = 2048  # logits that a program looks at together, and the length of lists
NUM_WARPS = 16
STAGES = tl.constexpr(4)  # tiles on their way while one is looked at
LOG2_E = tl.constexpr(1.4426950408889634)
_PIVOTS = tl.constexpr(4)
_ABOVE_ONE = tl.constexpr(0x3F800001)  # the bits after those of 1.0


@triton.jit
def weigh(x, top, scale):
    """0 below 2 ** -126, as on CPUs."""
    y = (x - top) * scale
    return tl.where(y >= -126.0, tl.exp2(y), 0.0)


@triton.jit
def find_best(source, count, TILE: tl.constexpr):
    """The greatest logit of each column of tiles [TILE] and the first place it is at; whether any is NaN."""
    column = tl.arange(0, TILE)
    best = tl.full([TILE], float("-inf"), tl.float32)
    best_at = tl.zeros([TILE], tl.int32)
    is_nan = tl.zeros([TILE], tl.int32)
    for start in tl.range(0, count, TILE, num_stages=STAGES):
        x = tl.load(source + start + column, mask=start + column < count, other=float("-inf"))
        best_at = tl.where(x > best, start + column, best_at)
        best = tl.where(x > best, x, best)
        is_nan |= (x != x).to(tl.int32)
    return best, best_at, tl.max(is_nan, axis=0) > 0


@triton.jit
def sum_from(source, count, top, scale, cutoff, TILE: tl.constexpr):
    """float64: the sum of the weights whose bits are `cutoff` or more."""
    column = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float64)
    for start in tl.range(0, count, TILE, num_stages=STAGES):
        x = tl.load(source + start + column, mask=start + column < count, other=float("-inf"))
        weight = weigh(x, top, scale)
        total += tl.where(weight.to(tl.int32, bitcast=True) >= cutoff, weight, 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def find_cutoff(source, count, top, scale, target, lowest, by_count, TILE: tl.constexpr):
    """The bits of the greatest cutoff, no less than `lowest`, such that the weights from it on sum to `target` or more;
    or, with `by_count`, that so many are left. `lowest` if there is none.

    Each pass cuts the place of the answer into five parts and keeps one: more parts cost more than passes do.
    """
    column = tl.arange(0, TILE)
    begin, end = lowest, lowest * 0 + _ABOVE_ONE
    while end - begin > 1:
        step = (end - begin + _PIVOTS) // (_PIVOTS + 1)
        bits = begin + (tl.arange(0, _PIVOTS) + 1) * step
        sums = tl.zeros([TILE, _PIVOTS], tl.float32)
        for start in tl.range(0, count, TILE, num_stages=STAGES):
            x = tl.load(source + start + column, mask=start + column < count, other=float("-inf"))
            weight = weigh(x, top, scale)
            amount = tl.where(by_count, 1.0, weight)
            reaches = weight.to(tl.int32, bitcast=True)[:, None] >= bits[None, :]
            sums += tl.where(reaches, amount[:, None], 0.0)
        enough = (tl.sum(sums, axis=0) >= target) & (bits < end)
        begin += tl.sum(enough.to(tl.int32), axis=0) * step
        end = tl.minimum(end, begin + step)
    return begin


@triton.jit
def collect(source, count, top, scale, cutoff, values, ids, TILE: tl.constexpr):
    """Lists logits whose weights' bits are `cutoff` or more, in their order, and their places, as far as TILE of each
    go; returns how many there are."""
    column = tl.arange(0, TILE)
    length = 0
    for start in tl.range(0, count, TILE, num_stages=STAGES):
        x = tl.load(source + start + column, mask=start + column < count, other=float("-inf"))
        is_kept = weigh(x, top, scale).to(tl.int32, bitcast=True) >= cutoff
        num_kept = tl.sum(is_kept.to(tl.int32), axis=0)
        if num_kept > 0:
            to = length + tl.cumsum(is_kept.to(tl.int32), axis=0) - 1
            has_room = is_kept & (to < TILE)
            tl.store(values + to, x, mask=has_room)
            tl.store(ids + to, start + column, mask=has_room)
        length += num_kept
    tl.debug_barrier()
    return length


@triton.jit
def store_columns(best, values, TILE: tl.constexpr):
    """Puts the columns' greatest logits where a list will be, to search among them."""
    tl.store(values + tl.arange(0, TILE), best)
    tl.debug_barrier()
