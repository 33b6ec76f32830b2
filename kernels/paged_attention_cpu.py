"""Attention over the paged KV cache on the CPU, pages read in place.

softmax(q k^T * scale) v per query, by blocks of the cache with a running maximum and sum (online softmax: Milakov and
Gimelshein 2018, "Online normalizer calculation for softmax"). All query heads that share a KV head are computed
together, for a tile of queries at a time, so that a page is read and widened to float32 once per tile.
"""

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from manta.kernels.cpu_scalars import KINDS, exp, jit, load, load_int32, num_chunks, store
from manta.kernels.metadata import AttentionMetadata

QUERY_TILE = 16
UNLIMITED = 1 << 40  # a window no sequence fills
_LOWEST = np.float32(-1e30)
_F32 = np.float32(0)
_ZERO = np.float32(0)


@jit(forceinline=True)
def _widen(address: Any, start: Any, count: Any, kind: Any, tile: Any) -> None:
    """tile[:count] = the tensor's elements start : start + count."""
    for i in range(count):
        store(tile, i, load(address, start + i, kind), _F32)


@jit(forceinline=True)
def _scores(q: Any, q_at: Any, keys: Any, first: Any, last: Any, dim: Any, scores: Any) -> Any:
    """scores[t] = q . keys[t] for t in first : last; returns the greatest."""
    greatest = _LOWEST
    t = first
    while t + 4 <= last:
        at = t * dim
        s0 = s1 = s2 = s3 = _ZERO
        for d in range(dim):
            x = load(q, q_at + d, _F32)
            s0 += x * load(keys, at + d, _F32)
            s1 += x * load(keys, at + dim + d, _F32)
            s2 += x * load(keys, at + 2 * dim + d, _F32)
            s3 += x * load(keys, at + 3 * dim + d, _F32)
        store(scores, t, s0, _F32)
        store(scores, t + 1, s1, _F32)
        store(scores, t + 2, s2, _F32)
        store(scores, t + 3, s3, _F32)
        greatest = max(greatest, max(max(s0, s1), max(s2, s3)))
        t += 4
    while t < last:
        total = _ZERO
        for d in range(dim):
            total += load(q, q_at + d, _F32) * load(keys, t * dim + d, _F32)
        store(scores, t, total, _F32)
        greatest = max(greatest, total)
        t += 1
    return greatest


@jit(forceinline=True)
def _add_values(acc: Any, acc_at: Any, values: Any, weights: Any, first: Any, last: Any, dim: Any) -> None:
    """acc += sum over t of weights[t] * values[t]; four tokens at a time, so that acc is read a fourth as often."""
    t = first
    while t + 4 <= last:
        w0, w1 = load(weights, t, _F32), load(weights, t + 1, _F32)
        w2, w3 = load(weights, t + 2, _F32), load(weights, t + 3, _F32)
        at = t * dim
        for d in range(dim):
            x = load(acc, acc_at + d, _F32)
            x += w0 * load(values, at + d, _F32)
            x += w1 * load(values, at + dim + d, _F32)
            x += w2 * load(values, at + 2 * dim + d, _F32)
            x += w3 * load(values, at + 3 * dim + d, _F32)
            store(acc, acc_at + d, x, _F32)
        t += 4
    while t < last:
        w0 = load(weights, t, _F32)
        for d in range(dim):
            store(acc, acc_at + d, load(acc, acc_at + d, _F32) + w0 * load(values, t * dim + d, _F32), _F32)
        t += 1


@jit(forceinline=True)
def _load_queries(q: Any, at: Any, dim: Any, scale: Any, kind: Any, q_tile: Any, acc: Any, tile_at: Any) -> None:
    for d in range(dim):
        store(q_tile, tile_at + d, load(q, at + d, kind) * scale, _F32)
        store(acc, tile_at + d, _ZERO, _F32)


@jit(forceinline=True)
def _update(
    i: Any, first: Any, last: Any, dim: Any,
    q_tile: Any, key_tile: Any, value_tile: Any, scores: Any, acc: Any, top: Any, norm: Any,
) -> None:  # fmt: skip
    """Takes the page's tokens first : last into query i's maximum, sum and weighted values."""
    greatest = _scores(q_tile, i * dim, key_tile, first, last, dim, scores)
    highest = load(top, i, _F32)
    if greatest > highest:
        shrink = exp(highest - greatest)
        highest = greatest
        store(top, i, highest, _F32)
        store(norm, i, load(norm, i, _F32) * shrink, _F32)
        for d in range(dim):
            store(acc, i * dim + d, load(acc, i * dim + d, _F32) * shrink, _F32)
    total = _ZERO
    for t in range(first, last):
        weight = exp(load(scores, t, _F32) - highest)
        store(scores, t, weight, _F32)
        total += weight
    store(norm, i, load(norm, i, _F32) + total, _F32)
    _add_values(acc, i * dim, value_tile, scores, first, last, dim)


@jit(forceinline=True)
def _items_of_dim(
    begin: Any, end: Any, step: Any, num_tiles: Any, q: Any, keys: Any, values: Any, out: Any, query_start: Any,
    seq_lens: Any, block_tables: Any, max_blocks: Any, num_kv_heads: Any, group: Any, dim: Any, block_size: Any,
    q_stride: Any, scale: Any, window: Any, scratch: Any, kind: Any,
) -> None:  # fmt: skip
    """Items begin, begin + step, ... of rows x query tiles x KV heads. `scratch`: see paged_attention."""
    tile_rows = QUERY_TILE * group
    page_size = block_size * dim
    q_tile = scratch
    acc = q_tile + 4 * tile_rows * dim
    key_tile = acc + 4 * tile_rows * dim
    value_tile = key_tile + 4 * page_size
    scores = value_tile + 4 * page_size
    top = scores + 4 * block_size
    norm = top + 4 * tile_rows
    out_stride = num_kv_heads * group * dim
    scale = np.float32(scale)
    for item in range(begin, end, step):
        row = item // (num_kv_heads * num_tiles)
        tile_start = item // num_kv_heads % num_tiles * QUERY_TILE
        head = item % num_kv_heads
        row_start = load_int32(query_start, row)
        row_len = load_int32(query_start, row + 1) - row_start
        num_queries = min(QUERY_TILE, row_len - tile_start)
        if num_queries <= 0:
            continue
        first_token = row_start + tile_start
        for i in range(num_queries * group):
            at = (first_token + i // group) * q_stride + (head * group + i % group) * dim
            _load_queries(q, at, dim, scale, kind, q_tile, acc, i * dim)
            store(top, i, _LOWEST, _F32)
            store(norm, i, _ZERO, _F32)
        position = load_int32(seq_lens, row) - row_len + tile_start  # of the tile's first query
        for block in range(max(0, position - window + 1) // block_size, (position + num_queries - 1) // block_size + 1):
            base = block * block_size
            count = min(block_size, position + num_queries - base)
            page = load_int32(block_tables, row * max_blocks + block) * num_kv_heads + head
            _widen(keys, page * page_size, count * dim, kind, key_tile)
            _widen(values, page * page_size, count * dim, kind, value_tile)
            for i in range(num_queries * group):
                query_position = position + i // group
                first = max(query_position - window + 1 - base, 0)
                last = min(query_position + 1 - base, count)
                if first < last:
                    _update(i, first, last, dim, q_tile, key_tile, value_tile, scores, acc, top, norm)
        for i in range(num_queries * group):
            at = (first_token + i // group) * out_stride + (head * group + i % group) * dim
            inverse = np.float32(1.0) / load(norm, i, _F32)
            for d in range(dim):
                store(out, at + d, load(acc, i * dim + d, _F32) * inverse, kind)


@jit()
def _items(
    begin: Any, end: Any, step: Any, num_tiles: Any, q: Any, keys: Any, values: Any, out: Any, query_start: Any,
    seq_lens: Any, block_tables: Any, max_blocks: Any, num_kv_heads: Any, group: Any, dim: Any, block_size: Any,
    q_stride: Any, scale: Any, window: Any, scratch: Any, kind: Any,
) -> None:  # fmt: skip
    """The usual head sizes as constants, which lets the compiler unroll: a quarter less time."""
    if dim == 64:
        _items_of_dim(
            begin, end, step, num_tiles, q, keys, values, out, query_start, seq_lens, block_tables, max_blocks,
            num_kv_heads, group, 64, block_size, q_stride, scale, window, scratch, kind,
        )  # fmt: skip
    elif dim == 128:
        _items_of_dim(
            begin, end, step, num_tiles, q, keys, values, out, query_start, seq_lens, block_tables, max_blocks,
            num_kv_heads, group, 128, block_size, q_stride, scale, window, scratch, kind,
        )  # fmt: skip
    else:
        _items_of_dim(
            begin, end, step, num_tiles, q, keys, values, out, query_start, seq_lens, block_tables, max_blocks,
            num_kv_heads, group, dim, block_size, q_stride, scale, window, scratch, kind,
        )  # fmt: skip


@jit(parallel=True)
def _items_parallel(
    chunks: Any, end: Any, num_tiles: Any, q: Any, keys: Any, values: Any, out: Any, query_start: Any,
    seq_lens: Any, block_tables: Any, max_blocks: Any, num_kv_heads: Any, group: Any, dim: Any, block_size: Any,
    q_stride: Any, scale: Any, window: Any, scratch: Any, scratch_bytes: Any, kind: Any,
) -> None:  # fmt: skip
    for chunk in prange(chunks):
        _items(
            chunk, end, chunks, num_tiles, q, keys, values, out, query_start, seq_lens, block_tables, max_blocks,
            num_kv_heads, group, dim, block_size, q_stride, scale, window, scratch + chunk * scratch_bytes, kind,
        )  # fmt: skip


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention of each row's queries over its pages. Same contract as reference.paged_attention.

    q: [T, num_heads * head_dim], rows may be strided; keys, values: [num_blocks, num_kv_heads, block_size, head_dim],
    contiguous, all of one dtype of KINDS. Returns [T, num_heads * head_dim].
    """
    _, num_kv_heads, block_size, dim = keys.shape
    num_tokens, width = q.shape
    assert q.stride(1) == 1
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert q.dtype == keys.dtype == values.dtype
    out = torch.empty(num_tokens, width, dtype=q.dtype)
    group = width // (num_kv_heads * dim)
    num_tiles = -(-metadata.max_query_len // QUERY_TILE)
    num_items = metadata.num_rows * num_tiles * num_kv_heads
    tables = metadata.block_tables
    chunks = num_chunks(2 * num_tokens * metadata.max_seq_len * width)
    scratch_size = 2 * QUERY_TILE * group * (dim + 1) + block_size * (2 * dim + 1)
    scratch_size = -(-scratch_size // 16) * 16  # whole cache lines, so that threads do not share one
    scratch = torch.empty(chunks * scratch_size, dtype=torch.float32)
    common = (
        num_items, num_tiles, q.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(),
        metadata.query_start.data_ptr(), metadata.seq_lens.data_ptr(), tables.data_ptr(), tables.stride(0),
        num_kv_heads, group, dim, block_size, q.stride(0), scale, UNLIMITED if window is None else window,
    )  # fmt: skip
    if chunks == 1:
        _items(0, common[0], 1, *common[1:], scratch.data_ptr(), KINDS[q.dtype])
    else:
        _items_parallel(chunks, *common, scratch.data_ptr(), 4 * scratch_size, KINDS[q.dtype])
    return out
