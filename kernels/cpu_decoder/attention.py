"""Causal attention over the paged KV cache: pages are read in place, both products run as tiles.

softmax(q k^T * scale) v by chunks of the sequence with a running maximum and sum (online softmax: Milakov and
Gimelshein 2018, "Online normalizer calculation for softmax"; as in FlashAttention, Dao et al. 2022). The query heads
that share a KV head, and up to QUERY_ROWS rows of them, are one item of work, which goes over every chunk in tiles
(`attention_tile`). Where there are fewer items than threads could take, long sequences are split and the parts joined
afterwards (as in Flash-Decoding, Dao et al. 2023).
"""

from typing import Any

import numpy as np

from manta.kernels.cpu_decoder.attention_tile import (
    ACC,
    ACC_STRIDE,
    IS_WIDE,
    KEY_PAGES,
    LOWEST,
    NORM,
    QUERIES,
    TOP,
    VALUE_PAGES,
    add_tile,
    close_gaps,
    lay_out,
    score_tile,
    weigh_tile,
    widen_chunk,
)
from manta.kernels.cpu_decoder.tiles import LANES, MAX_ROWS
from manta.kernels.cpu_scalars import exp, item_bytes, jit, load, load_int32, load_int64, store, store_int64

ITEMS_PER_THREAD = 4  # of all KV heads each: enough that threads which take one after another end together

# Fields of an item of work, int64 each
ITEM_ROW, ITEM_FIRST_QUERY, ITEM_NUM_QUERIES, ITEM_BEGIN, ITEM_END, ITEM_PART = range(6)
ITEM_FIELDS = 6

_F32 = np.float32(0)
_ZERO, _ONE = np.float32(0), np.float32(1)


@jit()
def _load_queries(
    rows: Any, qkv: Any, qkv_stride: Any, first_token: Any, first_head: Any, group: Any, dim: Any, stride: Any,
    scale: Any, queries: Any, left: Any,
) -> None:  # fmt: skip
    """queries [rows, stride] = the item's queries, scaled; row i is head i % group of query i // group."""
    for i in range(rows):
        at = (first_token + i // group) * qkv_stride + (first_head + i % group) * dim
        for d in range(dim):
            store(queries, i * stride + d, load(qkv, at + d, _F32) * scale, left)


@jit()
def _list_pages(
    work: Any, table: Any, num_pages: Any, keys: Any, values: Any, num_kv_heads: Any, head: Any, page_bytes: Any
) -> None:
    """The addresses of one head's pages, of the blocks that the int32s at `table` name."""
    key_pages, value_pages = load_int64(work, KEY_PAGES), load_int64(work, VALUE_PAGES)
    for p in range(num_pages):
        page = (load_int32(table, p) * num_kv_heads + head) * page_bytes
        store_int64(key_pages, p, keys + page)
        store_int64(value_pages, p, values + page)


@jit()
def _attend_chunk(
    work: Any, rows: Any, group: Any, position: Any, window: Any, base: Any, num_tokens: Any, num_pages: Any,
    block_size: Any, page_tokens: Any, dim: Any, page_dims: Any, left: Any, kind: Any,
) -> None:  # fmt: skip
    """Every tile of the item over tokens base : base + num_tokens, as far as its last query sees."""
    if load_int64(work, IS_WIDE):
        widen_chunk(work, num_pages, num_tokens, block_size, page_tokens, dim, page_dims, kind)
    for first in range(0, rows, MAX_ROWS):
        count = min(MAX_ROWS, rows - first)
        seen = min(num_tokens, position + (first + count - 1) // group + 1 - base)
        if seen <= 0:
            continue
        seen_pages = (seen + block_size - 1) // block_size
        has_gaps = page_tokens != block_size
        columns = seen_pages * page_tokens if has_gaps else seen
        score_tile(
            work, first, count, (columns + LANES - 1) // LANES, dim, page_dims, page_tokens, left, kind
        )  # fmt: skip
        if has_gaps:
            close_gaps(work, count, seen_pages, page_tokens, block_size)
        weigh_tile(work, first // MAX_ROWS, count, group, position, window, base, seen, page_dims, left)
        add_tile(work, first, count, seen, block_size, page_dims, left, kind)


@jit()
def _keep(
    work: Any, rows: Any, group: Any, dim: Any, out: Any, out_stride: Any, first_token: Any, first_head: Any,
    parts: Any, first_part_row: Any, left: Any,
) -> None:  # fmt: skip
    """Writes out [.., dim], or, with first_part_row >= 0, parts float32 [.., dim + 2]: accumulator, maximum, sum."""
    acc, stride = load_int64(work, ACC), load_int64(work, ACC_STRIDE)
    for i in range(rows):
        place = i // MAX_ROWS * LANES + i % MAX_ROWS
        norm = load(load_int64(work, NORM), place, _F32)
        inverse = _ONE / norm
        if first_part_row >= 0:
            at = (first_part_row + i) * (dim + 2)
            for d in range(dim):
                store(parts, at + d, load(acc, i * stride + d, _F32), _F32)
            store(parts, at + dim, load(load_int64(work, TOP), place, _F32), _F32)
            store(parts, at + dim + 1, norm, _F32)
        else:
            at = (first_token + i // group) * out_stride + (first_head + i % group) * dim
            for d in range(dim):
                store(out, at + d, load(acc, i * stride + d, _F32) * inverse, left)


def attend_item(
    item: Any, head: Any, qkv: Any, qkv_stride: Any, keys: Any, values: Any, out: Any, out_stride: Any,
    query_start: Any, seq_lens: Any, block_tables: Any, max_blocks: Any, num_kv_heads: Any, group: Any, dim: Any,
    block_size: Any, page_tokens: Any, page_dims: Any, pages_per_chunk: Any, window: Any, parts: Any,
    scratch: Any, scale: Any, left: Any, kind: Any,
) -> None:  # fmt: skip
    """One KV head of one item: queries of a row over tokens ITEM_BEGIN : ITEM_END of its sequence.

    Writes out float32 [T, num_heads * dim], or with ITEM_PART >= 0 that part's accumulators, maxima and sums.
    """
    row = load_int64(item, ITEM_ROW)
    num_queries = load_int64(item, ITEM_NUM_QUERIES)
    rows = num_queries * group
    first_token = load_int32(query_start, row) + load_int64(item, ITEM_FIRST_QUERY)
    position = load_int32(seq_lens, row) - load_int32(query_start, row + 1) + first_token
    end = min(load_int64(item, ITEM_END), position + num_queries)
    lay_out(scratch, rows, group, page_tokens, page_dims, pages_per_chunk, left, kind)
    _load_queries(
        rows, qkv, qkv_stride, first_token, head * group, group, dim, page_dims, np.float32(scale),
        load_int64(scratch, QUERIES), left,
    )  # fmt: skip
    page_bytes = page_tokens * page_dims * item_bytes(kind)
    first_block = max(load_int64(item, ITEM_BEGIN), position - window + 1) // block_size
    end_block = (end + block_size - 1) // block_size
    for block in range(first_block, end_block, pages_per_chunk):
        num_pages = min(pages_per_chunk, end_block - block)
        table = block_tables + 4 * (row * max_blocks + block)
        _list_pages(scratch, table, num_pages, keys, values, num_kv_heads, head, page_bytes)
        base = block * block_size
        _attend_chunk(
            scratch, rows, group, position, window, base, min(end - base, num_pages * block_size), num_pages,
            block_size, page_tokens, dim, page_dims, left, kind,
        )  # fmt: skip
    part = load_int64(item, ITEM_PART)
    first_part_row = (part * num_kv_heads + head) * rows if part >= 0 else -1
    _keep(scratch, rows, group, dim, out, out_stride, first_token, head * group, parts, first_part_row, left)


def join_parts(
    token: Any, first_part: Any, num_parts: Any, head: Any, num_kv_heads: Any, group: Any, dim: Any, parts: Any,
    out: Any, out_stride: Any, left: Any,
) -> None:  # fmt: skip
    """Joins the parts of a row of one query: one KV head of out float32 [T, num_heads * dim]."""
    width = dim + 2
    for g in range(group):
        at = token * out_stride + (head * group + g) * dim
        highest = LOWEST
        for p in range(first_part, first_part + num_parts):
            highest = max(highest, load(parts, ((p * num_kv_heads + head) * group + g) * width + dim, _F32))
        first = ((first_part * num_kv_heads + head) * group + g) * width
        total = _ZERO
        for p in range(first_part, first_part + num_parts):
            part = ((p * num_kv_heads + head) * group + g) * width
            weight = exp(load(parts, part + dim, _F32) - highest)
            total += weight * load(parts, part + dim + 1, _F32)
            for d in range(dim):  # into the first part, which nobody else reads
                others = load(parts, first + d, _F32) if p > first_part else _ZERO
                store(parts, first + d, others + weight * load(parts, part + d, _F32), _F32)
        inverse = _ONE / total
        for d in range(dim):
            store(out, at + d, load(parts, first + d, _F32) * inverse, left)
