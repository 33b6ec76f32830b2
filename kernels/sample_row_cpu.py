"""One row's draw on the CPU, without sorting: few passes over the row, most of them over few tokens.

A weight is e ** ((x - max) / temperature), so the best token's is 1. Every filter is a cutoff: tokens of less weight
are out, ties with the last one kept stay. Filters come in the order min_p and top_k, then top_p on what they leave.

- Tokens that top_k or min_p must drop are left out before weights are computed: the row is cut into blocks, and what
  lies below the k-th largest maximum of a block is not among the k largest tokens.
- The cutoffs of top_k and top_p are found by bisection over the bits of float32, which order as the weights do. What
  lies outside the interval is dropped on the way, as in quickselect (Hoare, "Algorithm 65: Find", 1961).
- The draw inverts the cumulative distribution in the order of token ids.

A row is one thread's, and its sums have one order: the token depends on the row alone.
"""

import math
from typing import Any

import numpy as np

from manta.kernels.cpu_decoder.vectors import LANES
from manta.kernels.cpu_scalars import jit, load, load_int32, store
from manta.kernels.sample_vectors_cpu import (
    BLOCK,
    BLOCK_VECTORS,
    any_within,
    bits_of,
    count_from,
    float_of,
    mass_from,
    maxima,
    store_int32,
    sum_from,
    weigh,
)

_F32 = np.float32(0)
_ONE, _HALF, _TWO = np.float32(1), np.float32(0.5), np.float32(2)
_INFINITY, _LOWEST = np.float32(np.inf), np.float32(-np.inf)
_SLACK = np.float32(1e-6)  # more than float32 rounds: tokens that may tie in weight are not left out by their logits
_LOG2_E = math.log2(math.e)
_BITS_OF_ONE = 0x3F800000
_CUT = 16  # a bisection drops what it need not look at any more when only one weight in so many is left
_DRAW_VECTORS = 64  # of the steps in which the draw looks for its place
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def row_floats(vocab_size: int) -> int:
    """Room for a row: whole blocks, and a block more."""
    return (vocab_size + BLOCK - 1) // BLOCK * BLOCK + BLOCK


def scratch_bytes(vocab_size: int) -> int:
    """What `draw_token` needs: weights, what a bisection has left, token ids, maxima of blocks, the last block."""
    return 4 * (3 * row_floats(vocab_size) + row_floats(vocab_size // BLOCK) + BLOCK)


@jit()
def _mix(x: Any) -> Any:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


@jit()
def uniform(seed: Any, position: Any) -> Any:
    """The random number float64 in (0, 1) of a sequence's seed (int64 of the same bits) and a position: the one of
    `workers/draws.py`, where its source is given."""
    key = _mix(np.uint64(seed) + _GOLDEN)
    bits = _mix(key + _GOLDEN * np.uint64(position)) >> np.uint64(24)
    return (np.float64(bits) + 0.5) * 2.0**-40


@jit(forceinline=True)
def _vectors(count: Any) -> Any:
    return (count + LANES - 1) // LANES


@jit()
def _pad(address: Any, count: Any, value: Any) -> None:
    """Fills the last vector of `count` floats."""
    for i in range(count, _vectors(count) * LANES):
        store(address, i, value, _F32)


@jit()
def _kth_block(highest: Any, num_blocks: Any, top: Any, k: Any, width: Any) -> Any:
    """A logit that k blocks or more reach, and not many more; -inf if k blocks have no logit above that."""
    vectors = _vectors(num_blocks)
    good, bad = _LOWEST, top
    logit = top
    for _ in range(64):
        if count_from(highest, vectors, logit) >= k:
            good = logit
            break
        bad = logit
        logit = top - width
        width = width * _TWO
    if good == _LOWEST:
        return good
    for _ in range(16):
        middle = good + _HALF * (bad - good)
        if count_from(highest, vectors, good) <= k + k // 4 or middle <= good or middle >= bad:
            break
        if count_from(highest, vectors, middle) >= k:
            good = middle
        else:
            bad = middle
    return good


@jit()
def _lowest_candidate(highest: Any, num_blocks: Any, top: Any, temperature: Any, top_k: Any, min_p: Any) -> Any:
    """A logit below which every token is out for certain; -inf if none is known."""
    lowest = _LOWEST
    if min_p > _F32:
        lowest = np.float32(top + temperature * math.log(min_p))
    if top_k > 0 and top_k <= num_blocks // 2:
        lowest = max(lowest, _kth_block(highest, num_blocks, top, top_k, temperature))
    return lowest - _SLACK * (abs(top) + abs(lowest) + temperature) if lowest > _LOWEST else lowest


@jit()
def _collect(
    logits: Any, whole: Any, last: Any, highest: Any, num_blocks: Any, lowest: Any, values: Any, ids: Any
) -> Any:
    """Copies logits from `lowest` on, and their ids, in their order; returns how many."""
    count = 0
    for block in range(num_blocks):
        if load(highest, block, _F32) < lowest:
            continue
        source = logits + 4 * BLOCK * block if block < whole else last
        for vector in range(BLOCK_VECTORS):
            at = source + 4 * LANES * vector
            if any_within(at, lowest, _INFINITY):
                for lane in range(LANES):
                    value = load(at, lane, _F32)
                    store(values, count, value, _F32)
                    store_int32(ids, count, BLOCK * block + LANES * vector + lane)
                    count += 1 if value >= lowest else 0
    _pad(values, count, _LOWEST)
    return count


@jit()
def _keep_within(weights: Any, vectors: Any, lowest: Any, end: Any, out: Any) -> Any:
    """Copies the weights from `lowest` to below `end`; returns how many. `out` may be `weights`."""
    count = 0
    for vector in range(vectors):
        at = weights + 4 * LANES * vector
        if any_within(at, lowest, end):
            for lane in range(LANES):
                value = load(at, lane, _F32)
                store(out, count, value, _F32)
                count += 1 if value >= lowest and value < end else 0
    _pad(out, count, _F32)
    return count


@jit()
def _cutoff(weights: Any, count: Any, target: Any, lowest: Any, counts: Any, scratch: Any) -> Any:
    """The largest cutoff, no less than `lowest`, such that the weights from it on sum to `target` or more; or, with
    `counts`, that so many are left."""
    begin, end = bits_of(lowest), _BITS_OF_ONE + 1
    num_begin, num_end = mass_from(weights, _vectors(count), lowest)[1], 0.0  # weights from begin on, from end on
    mass_end = above = 0.0  # of those from end on: that are here, and that were dropped
    while end - begin > 1:
        if count > BLOCK and num_begin - num_end < count / _CUT:
            count = _keep_within(weights, _vectors(count), float_of(begin), float_of(end), scratch)
            weights = scratch
            above += num_end if counts else mass_end
            num_begin, num_end, mass_end = float(count), 0.0, 0.0
        middle = (begin + end) // 2
        mass, num = mass_from(weights, _vectors(count), float_of(middle))
        if above + (num if counts else mass) >= target:
            begin, num_begin = middle, num
        else:
            end, num_end, mass_end = middle, num, mass
    return float_of(begin)


@jit()
def _filter(weights: Any, count: Any, total: Any, top_k: Any, top_p: Any, min_p: Any, scratch: Any) -> Any:
    """The weight from which on tokens may be drawn, of weights that sum to `total`."""
    cutoff = _F32
    if top_k > 0:
        cutoff = _cutoff(weights, count, float(top_k), _F32, True, scratch)
    cutoff = max(cutoff, min_p)
    if top_p < _ONE:
        if cutoff > _F32:
            total = sum_from(weights, _vectors(count), cutoff)
        # Weights below this add up to less than 1 - top_p of the total.
        lowest = np.float32(0.999 * (1.0 - top_p) * total / count)
        cutoff = _cutoff(weights, count, top_p * total, max(cutoff, lowest), False, scratch)
    return cutoff


@jit()
def _place(weights: Any, count: Any, cutoff: Any, target: Any) -> Any:
    """The first place at which the weights from `cutoff` on, summed from the first, exceed `target`."""
    vectors = _vectors(count)
    total, begin = 0.0, 0  # begin: of the last part that has any, should rounding leave the target unreached
    for part in range(0, vectors, _DRAW_VECTORS):
        amount = sum_from(weights + 4 * LANES * part, min(_DRAW_VECTORS, vectors - part), cutoff)
        if amount > 0.0:
            begin = part * LANES
            if total + amount > target:
                break
        total += amount
    place = begin
    for i in range(begin, min(begin + _DRAW_VECTORS * LANES, count)):
        weight = load(weights, i, _F32)
        if weight >= cutoff and weight > _F32:
            place = i
            total += weight
            if total > target:
                break
    return place


@jit()
def draw_token(
    logits: Any, vocab_size: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any, draw: Any, scratch: Any
) -> Any:
    """The token of a row of logits float32 [vocab_size].

    temperature, top_p, min_p: float32, 1 and 0 when off; top_k: int64, 0 when off; draw: float64 in (0, 1). The last
    token if the row has a NaN, +inf or nothing but -inf.
    """
    stride = 4 * ((vocab_size + BLOCK - 1) // BLOCK * BLOCK + BLOCK)
    left, ids, last = scratch + stride, scratch + 2 * stride, scratch + 3 * stride
    highest = last + 4 * BLOCK
    whole = vocab_size // BLOCK
    num_blocks = (vocab_size + BLOCK - 1) // BLOCK
    top = maxima(logits, whole, highest)
    if num_blocks > whole:
        for i in range(BLOCK):
            at = whole * BLOCK + i
            store(last, i, load(logits, at, _F32) if at < vocab_size else _LOWEST, _F32)
        end = maxima(last, 1, highest + 4 * whole)
        top = end if end > top or end != end else top  # NaN stays
    _pad(highest, num_blocks, _LOWEST)
    if not abs(top) < _INFINITY:
        return vocab_size - 1
    scale = np.float32(_LOG2_E / temperature)
    lowest = _lowest_candidate(highest, num_blocks, top, temperature, top_k, min_p)
    if lowest > _LOWEST:
        count = _collect(logits, whole, last, highest, num_blocks, lowest, scratch, ids)
        total = weigh(scratch, _vectors(count), top, scale, scratch)
    else:
        count = num_blocks * BLOCK
        total = weigh(logits, whole * BLOCK_VECTORS, top, scale, scratch)
        total += weigh(last, (num_blocks - whole) * BLOCK_VECTORS, top, scale, scratch + 4 * BLOCK * whole)
    cutoff = _filter(scratch, count, total, top_k, top_p, min_p, left)
    if cutoff > _F32:
        total = sum_from(scratch, _vectors(count), cutoff)
    place = _place(scratch, count, cutoff, draw * total)
    return load_int32(ids, place) if lowest > _LOWEST else place
