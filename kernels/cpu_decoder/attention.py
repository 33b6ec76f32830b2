"""Causal attention over the paged KV cache: pages are read in place, both products run as tiles.

softmax(q k^T * scale) v by chunks of the sequence with a running maximum and sum (online softmax: Milakov and
Gimelshein 2018, "Online normalizer calculation for softmax"; as in FlashAttention, Dao et al. 2022). The query heads
that share a KV head, and up to QUERY_ROWS rows of them, are one left-hand side. Where there are fewer items of work
than threads could take, long sequences are split and the parts joined afterwards (as in Flash-Decoding, Dao et al.
2023).
"""

from typing import Any

import numpy as np

from manta.kernels.cpu_decoder.tiles import COLUMNS, LANES, MAX_ROWS, multiply_tile
from manta.kernels.cpu_decoder.vectors import exp_row, greatest, shrink_rows
from manta.kernels.cpu_scalars import exp, is_paired, item_bytes, jit, load, load_int32, load_int64, store, store_int64

QUERY_ROWS = 48  # queries times heads of an item
CHUNK_TOKENS = 128
ITEMS_PER_THREAD = 4  # of all KV heads each: enough that threads which take one after another end together

# Fields of an item of work, int64 each
ITEM_ROW, ITEM_FIRST_QUERY, ITEM_NUM_QUERIES, ITEM_BEGIN, ITEM_END, ITEM_PART = range(6)
ITEM_FIELDS = 6

_F32 = np.float32(0)
_ZERO, _ONE = np.float32(0), np.float32(1)
_LOWEST = np.float32(-1e30)


def scratch_bytes(group: int, page_tokens: int, page_dims: int) -> int:
    """What `attend_item` needs of a thread's own memory."""
    rows = max(QUERY_ROWS, group) + MAX_ROWS
    columns = chunk_pages(page_tokens) * page_tokens + COLUMNS
    floats = rows * (page_dims + _accumulator_stride(page_dims) + 2 * columns) + 4 * (rows + LANES)
    return 4 * floats + 8 * (chunk_pages(page_tokens) + 2) + 1024


def _accumulator_stride(page_dims: int) -> int:
    return -(-page_dims // COLUMNS) * COLUMNS


def chunk_pages(page_tokens: int) -> int:
    """Pages of a chunk; an even count, because a tile takes two columns of 16 tokens."""
    return max(2 if page_tokens == LANES else 1, CHUNK_TOKENS // page_tokens)


@jit()
def _load_queries(
    rows: Any, qkv: Any, qkv_stride: Any, first_token: Any, first_head: Any, group: Any, dim: Any, stride: Any,
    scale: Any, q: Any, left: Any,
) -> None:  # fmt: skip
    """q [rows, stride] = the item's queries, scaled; row i is head i % group of query i // group."""
    for i in range(rows):
        at = (first_token + i // group) * qkv_stride + (first_head + i % group) * dim
        for d in range(dim):
            store(q, i * stride + d, load(qkv, at + d, _F32) * scale, left)


@jit()
def _score_chunk(
    rows: Any, q: Any, dim: Any, page_dims: Any, pages: Any, num_pages: Any, page_tokens: Any, scores: Any,
    stride: Any, segment: Any, left: Any, kind: Any,
) -> None:  # fmt: skip
    """scores [rows, num_pages * page_tokens] = q @ keys; pages: the addresses of the key pages, int64."""
    step = 2 * LANES * item_bytes(kind)
    page_bytes = page_tokens * page_dims * item_bytes(kind)  # the next head's page is fetched meanwhile
    panels_per_page = page_tokens // LANES
    panel_bytes = LANES * page_dims * item_bytes(kind)
    num_panels = num_pages * panels_per_page
    for panel in range(0, num_panels, 2):
        first = load_int64(pages, panel // panels_per_page) + panel % panels_per_page * panel_bytes
        second = first
        if panel + 1 < num_panels:
            second = load_int64(pages, (panel + 1) // panels_per_page) + (panel + 1) % panels_per_page * panel_bytes
        store_int64(segment, 0, first)
        for r in range(0, rows, MAX_ROWS):
            multiply_tile(
                min(MAX_ROWS, rows - r), q + item_bytes(left) * r * page_dims, page_dims, segment, 1, 0, second - first,
                step, dim // 2, page_bytes, scores + 4 * (r * stride + panel * LANES), stride, 0, left, kind,
            )  # fmt: skip


@jit()
def _add_values(
    rows: Any, weights: Any, stride: Any, pages: Any, num_tokens: Any, block_size: Any, page_dims: Any, acc: Any,
    acc_stride: Any, left: Any, kind: Any,
) -> None:  # fmt: skip
    """acc [rows, dims] += weights [rows, num_tokens] @ values; pages: the addresses of the value pages, int64."""
    step = 2 * page_dims * item_bytes(kind)
    column_bytes = LANES * item_bytes(kind) * (2 if is_paired(kind) else 1)
    ahead = block_size * page_dims * item_bytes(kind)
    full = num_tokens // block_size
    rest = (num_tokens - full * block_size + 1) // 2
    for column in range(0, page_dims // LANES, 2):
        first = column * column_bytes
        second = first + column_bytes if column + 1 < page_dims // LANES else first
        for r in range(0, rows, MAX_ROWS):
            count = min(MAX_ROWS, rows - r)
            x = weights + item_bytes(left) * r * stride
            out = acc + 4 * (r * acc_stride + column * LANES)
            if full:
                multiply_tile(
                    count, x, stride, pages, full, first, second, step, block_size // 2, ahead, out, acc_stride, 1,
                    left, kind,
                )  # fmt: skip
            if rest:
                rest_at = item_bytes(left) * full * block_size
                multiply_tile(
                    count, x + rest_at, stride, pages + 8 * full, 1, first, second, step, rest, ahead, out,
                    acc_stride, 1, left, kind,
                )  # fmt: skip


@jit()
def _seen(query: Any, window: Any, base: Any, num_tokens: Any) -> Any:
    """Columns low : high of a chunk from token `base` are what the query at this position sees."""
    high = max(0, min(query + 1 - base, num_tokens))
    return min(high, max(0, query - window + 1 - base)), high


@jit()
def _fill_outside(row: Any, low: Any, high: Any, columns: Any, value: Any, kind: Any) -> None:
    """Columns of a row that are not in low : high = value."""
    for j in range(low):
        store(row, j, value, kind)
    for j in range(high, columns):
        store(row, j, value, kind)


@jit()
def _weigh_chunk(
    rows: Any, group: Any, position: Any, window: Any, base: Any, num_tokens: Any, scores: Any, weights: Any,
    stride: Any, top: Any, norm: Any, now: Any, shrink: Any, acc: Any, acc_stride: Any, page_dims: Any, left: Any,
) -> None:  # fmt: skip
    """Takes the scores of tokens base : base + num_tokens into each row's maximum, sum and accumulator.

    In loops of few dependences over rows, so that what a row waits for the next ones fill.
    """
    num_vectors = (num_tokens + LANES - 1) // LANES
    columns = num_vectors * LANES
    for i in range(rows):
        row = scores + 4 * i * stride
        low, high = _seen(position + i // group, window, base, num_tokens)
        _fill_outside(row, low, high, columns, _LOWEST, _F32)
        store(now, i, max(load(top, i, _F32), greatest(row, num_vectors)), _F32)
    shrink_rows(top, now, shrink, (rows + LANES - 1) // LANES)
    for i in range(rows):
        row = weights + item_bytes(left) * i * stride
        low, high = _seen(position + i // group, window, base, num_tokens)
        total = exp_row(scores + 4 * i * stride, num_vectors, load(top, i, _F32), row, left)
        if low == high:  # all of it so low that nothing seen so far is higher
            total = _ZERO
        _fill_outside(row, low, high, columns, _ZERO, left)
        factor = load(shrink, i, _F32)
        store(norm, i, load(norm, i, _F32) * factor + total, _F32)
        if factor != _ONE:
            for d in range(page_dims):
                store(acc, i * acc_stride + d, load(acc, i * acc_stride + d, _F32) * factor, _F32)


@jit()
def _close_gaps(rows: Any, scores: Any, stride: Any, num_pages: Any, page_tokens: Any, block_size: Any) -> None:
    """Pages smaller than a panel leave columns unused; moves the scores together."""
    for i in range(rows):
        for page in range(1, num_pages):
            for t in range(block_size):
                value = load(scores, i * stride + page * page_tokens + t, _F32)
                store(scores, i * stride + page * block_size + t, value, _F32)


def attend_item(
    item: Any, head: Any, qkv: Any, qkv_stride: Any, keys: Any, values: Any, out: Any, out_stride: Any,
    query_start: Any, seq_lens: Any, block_tables: Any, max_blocks: Any, num_kv_heads: Any, group: Any, dim: Any,
    block_size: Any, page_tokens: Any, page_dims: Any, pages_per_chunk: Any, window: Any, parts: Any,
    scratch: Any, scale: Any, left: Any, kind: Any,
) -> None:  # fmt: skip
    """One KV head of one item: queries of a row over tokens ITEM_BEGIN : ITEM_END of its sequence.

    Writes out float32 [T, num_heads * dim], or with ITEM_PART >= 0 that part's accumulators, maxima and sums.
    """
    row, first_query = load_int64(item, ITEM_ROW), load_int64(item, ITEM_FIRST_QUERY)
    rows = load_int64(item, ITEM_NUM_QUERIES) * group
    row_start = load_int32(query_start, row)
    position = load_int32(seq_lens, row) - load_int32(query_start, row + 1) + row_start + first_query
    end = min(load_int64(item, ITEM_END), position + load_int64(item, ITEM_NUM_QUERIES))
    acc_stride = (page_dims + COLUMNS - 1) // COLUMNS * COLUMNS
    stride = pages_per_chunk * page_tokens + COLUMNS
    space = max(QUERY_ROWS, group) + MAX_ROWS
    segment = scratch
    key_pages = segment + 64
    value_pages = key_pages + 8 * pages_per_chunk
    q = (value_pages + 8 * pages_per_chunk + 63) // 64 * 64
    acc = q + 4 * space * page_dims
    scores = acc + 4 * space * acc_stride
    weights = scores if item_bytes(left) == 4 else scores + 4 * space * stride
    top = weights + 4 * space * stride
    norm, now, shrink = top + 4 * (space + LANES), top + 8 * (space + LANES), top + 12 * (space + LANES)
    _load_queries(
        rows,
        qkv,
        qkv_stride,
        row_start + first_query,
        head * group,
        group,
        dim,
        page_dims,
        np.float32(scale),
        q,
        left,
    )
    for i in range(rows):
        store(top, i, _LOWEST, _F32)
        store(norm, i, _ZERO, _F32)
        for d in range(acc_stride):
            store(acc, i * acc_stride + d, _ZERO, _F32)
    page_bytes = page_tokens * page_dims * item_bytes(kind)
    first_block = max(load_int64(item, ITEM_BEGIN), position - window + 1) // block_size
    end_block = (end + block_size - 1) // block_size
    for block in range(first_block, end_block, pages_per_chunk):
        num_pages = min(pages_per_chunk, end_block - block)
        for p in range(num_pages):
            page = (load_int32(block_tables, row * max_blocks + block + p) * num_kv_heads + head) * page_bytes
            store_int64(key_pages, p, keys + page)
            store_int64(value_pages, p, values + page)
        _score_chunk(
            rows, q, dim, page_dims, key_pages, num_pages, page_tokens, scores, stride, segment, left, kind
        )  # fmt: skip
        if page_tokens != block_size:
            _close_gaps(rows, scores, stride, num_pages, page_tokens, block_size)
        base = block * block_size
        num_tokens = min(end - base, num_pages * block_size)
        _weigh_chunk(
            rows, group, position, window, base, num_tokens, scores, weights, stride, top, norm, now, shrink, acc,
            acc_stride, page_dims, left,
        )  # fmt: skip
        _add_values(rows, weights, stride, value_pages, num_tokens, block_size, page_dims, acc, acc_stride, left, kind)
    part = load_int64(item, ITEM_PART)
    if part >= 0:
        _keep_part(rows, (part * num_kv_heads + head) * rows, dim, acc, acc_stride, top, norm, parts)
        return
    for i in range(rows):
        at = (row_start + first_query + i // group) * out_stride + (head * group + i % group) * dim
        inverse = _ONE / load(norm, i, _F32)
        for d in range(dim):
            store(out, at + d, load(acc, i * acc_stride + d, _F32) * inverse, left)


@jit()
def _keep_part(
    rows: Any, first: Any, dim: Any, acc: Any, acc_stride: Any, top: Any, norm: Any, parts: Any
) -> None:  # fmt: skip
    """parts float32 [..., dim + 2]: accumulator, maximum and sum of each row."""
    for i in range(rows):
        at = (first + i) * (dim + 2)
        for d in range(dim):
            store(parts, at + d, load(acc, i * acc_stride + d, _F32), _F32)
        store(parts, at + dim, load(top, i, _F32), _F32)
        store(parts, at + dim + 1, load(norm, i, _F32), _F32)


def join_parts(
    token: Any, first_part: Any, num_parts: Any, head: Any, num_kv_heads: Any, group: Any, dim: Any, parts: Any,
    out: Any, out_stride: Any, left: Any,
) -> None:  # fmt: skip
    """Joins the parts of a row of one query: one KV head of out float32 [T, num_heads * dim]."""
    width = dim + 2
    for g in range(group):
        at = token * out_stride + (head * group + g) * dim
        highest = _LOWEST
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
