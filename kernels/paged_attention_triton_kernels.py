"""The GPU programs of paged attention: `attend` and `merge`. Launched by `paged_attention_triton`; see there.

A program of `attend` holds one query tile: block_q tokens of one row, each with the GROUP query heads that share a KV
head. It walks the row's keys in tiles of BLOCK_N at multiples of BLOCK_N, with the online softmax of FlashAttention-2
(Dao 2023) in base 2: exp(scale * s) = exp2(scale * log2(e) * s). Only tiles that some query of the tile does not see
as a whole are masked: those at the end, on the diagonal, and at the beginning of a sliding window.

Scores are raw products until the exponential; `qk_scale` (positive) carries softmax scale, log2(e) and the scale of
quantised keys. The scale of quantised values is applied once, to the result.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

E4M3_AS_FLOAT16 = tl.constexpr(
    256.0
)  # what e4m3 bits moved into a float16 have to be multiplied by: the biases are 7 and 15


@triton.jit
def _find_row(query_start, tile, num_rows, BLOCK_Q: tl.constexpr):
    """The row that query tile `tile` may belong to: row r's tiles begin at query_start[r] // BLOCK_Q + r."""
    low = 0
    high = num_rows
    while high - low > 1:
        middle = (low + high) // 2
        first = tl.load(query_start + middle) // BLOCK_Q + middle
        low = tl.where(first <= tile, middle, low)
        high = tl.where(first <= tile, high, middle)
    return low


@triton.jit
def _find_queries(query_start, num_rows, BLOCK_Q: tl.constexpr, ONE_TOKEN: tl.constexpr):
    """This program's row, its first token, its number of tokens, and how many of them are before the query tile."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tile of a prompt has most to do: first
    row = tile
    first = tile
    num_queries = 1
    offset = 0
    if not ONE_TOKEN:
        row = _find_row(query_start, tile, num_rows, BLOCK_Q)
        first = tl.load(query_start + row)
        num_queries = tl.load(query_start + row + 1) - first
        offset = (tile - first // BLOCK_Q - row) * BLOCK_Q
    return row, first, num_queries, offset


@triton.jit
def _to_dot(x, DOT: tl.constexpr, FP8_BITS: tl.constexpr):
    """Keys or values as the matrix units take them. FP8_BITS: e4m3 as int8, which becomes x / 256, exactly."""
    if FP8_BITS:
        # The sign is extended to bits 15 and 14 and exponent and mantissa land below; bit 14 is cleared.
        x = ((x.to(tl.int16) << 7) & -0x4080).to(tl.float16, bitcast=True)
    return x.to(DOT)


@triton.jit
def _load_pages(table, start, end, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The block of each of the keys start : start + BLOCK_N, or the one that holds them all; from key `end` on any."""
    key = start
    if BLOCK_SIZE % BLOCK_N != 0:
        key = start + tl.arange(0, BLOCK_N)
    return tl.load(table + key // BLOCK_SIZE, mask=key < end, other=0)


@triton.jit
def _key_offsets(
    pages, start, head_offset, page_stride,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where keys start : start + BLOCK_N of a head lie: [BLOCK_N, DIM_PADDED]. pages: as `_load_pages` gives them."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, DIM_PADDED)
    base = pages.to(tl.int64) * page_stride + head_offset
    if BLOCK_SIZE % BLOCK_N == 0:  # written so that the compiler sees rows follow each other in memory
        offsets = base + ((start % BLOCK_SIZE + n) * DIM)[:, None] + d[None, :]
    else:
        offsets = (base + (start + n) % BLOCK_SIZE * DIM)[:, None] + d[None, :]
    return offsets


@triton.jit
def _attend_tiles(
    q, m, total, acc, first_tile, end_tile, position, end, window,
    qk_scale, keys, values, table, head_offset, page_stride,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, DOT: tl.constexpr, FP8_BITS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Goes on with maxima m, sums total and outputs acc of a query tile over key tiles first_tile : end_tile."""
    has_dim = (tl.arange(0, DIM_PADDED) < DIM)[None, :]
    # Pages are looked up a tile ahead, so that loads of keys and values wait for nothing when they are pipelined.
    next_pages = _load_pages(table, first_tile * BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
    for tile in range(first_tile, end_tile):
        start = tile * BLOCK_N
        pages = next_pages
        next_pages = _load_pages(table, start + BLOCK_N, end, BLOCK_SIZE, BLOCK_N)
        at = _key_offsets(pages, start, head_offset, page_stride, DIM, DIM_PADDED, BLOCK_SIZE, BLOCK_N)
        key = start + tl.arange(0, BLOCK_N)
        k = tl.load(keys + at) if DIM == DIM_PADDED else tl.load(keys + at, mask=has_dim, other=0.0)
        s = tl.dot(q, tl.trans(_to_dot(k, DOT, FP8_BITS)), input_precision="ieee")
        if MASKED:
            seen = key[None, :] <= position[:, None]
            if HAS_WINDOW:
                seen = seen & (key[None, :] > position[:, None] - window)
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1) * qk_scale)
        base = m_new
        if MASKED:  # a query may have seen no key yet
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * qk_scale - base[:, None])
        decay = tl.exp2(m - base)
        total = total * decay + tl.sum(p, axis=1)
        m = m_new
        if MASKED:  # what lies behind the last key may be anything, even NaN
            v = tl.load(values + at, mask=(key < end)[:, None] & has_dim, other=0.0)
        elif DIM == DIM_PADDED:
            v = tl.load(values + at)
        else:
            v = tl.load(values + at, mask=has_dim, other=0.0)
        acc = tl.dot(p.to(DOT), _to_dot(v, DOT, FP8_BITS), acc * decay[:, None], input_precision="ieee")
    return m, total, acc


@triton.jit
def _attend_keys(
    q, begin, full, full_end, end_tile, position, end, window, qk_scale, keys, values, table, head_offset, page_stride,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, DOT: tl.constexpr, FP8_BITS: tl.constexpr,
):  # fmt: skip
    """Maxima, sums and outputs of a query tile over the key tiles begin : end_tile, as `_key_tiles` gives them."""
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_PADDED], tl.float32)
    if HAS_WINDOW:
        m, total, acc = _attend_tiles(
            q, m, total, acc, begin, full, position, end, window, qk_scale, keys, values, table, head_offset,
            page_stride, DIM, DIM_PADDED, BLOCK_SIZE, BLOCK_N, HAS_WINDOW, DOT, FP8_BITS, True,
        )  # fmt: skip
    m, total, acc = _attend_tiles(
        q, m, total, acc, full, full_end, position, end, window, qk_scale, keys, values, table, head_offset,
        page_stride, DIM, DIM_PADDED, BLOCK_SIZE, BLOCK_N, HAS_WINDOW, DOT, FP8_BITS, False,
    )  # fmt: skip
    return _attend_tiles(
        q, m, total, acc, full_end, end_tile, position, end, window, qk_scale, keys, values, table, head_offset,
        page_stride, DIM, DIM_PADDED, BLOCK_SIZE, BLOCK_N, HAS_WINDOW, DOT, FP8_BITS, True,
    )  # fmt: skip


@triton.jit
def _key_tiles(
    first_position, end, window, split, num_splits, MIN_SPLIT_TILES: tl.constexpr,
    FIXED_SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Key tiles of one split of a query tile as begin <= full <= full_end <= end; those of full : full_end unmasked.

    first_position: of the query tile's first query; end: behind the last key that any of its queries sees.
    """
    begin_tile = 0
    if HAS_WINDOW:
        begin_tile = tl.maximum(first_position - window + 1, 0) // BLOCK_N
    end_tile = (end + BLOCK_N - 1) // BLOCK_N
    if FIXED_SPLIT:
        split_tiles: tl.constexpr = FIXED_SPLIT // BLOCK_N
        begin_tile = split * split_tiles
        end_tile = tl.minimum(begin_tile + split_tiles, end_tile)
    else:
        share = (end_tile - begin_tile + num_splits - 1) // num_splits
        share = tl.maximum(share, MIN_SPLIT_TILES)
        if num_splits == 1:
            share = end_tile
        begin_tile += split * share
        end_tile = tl.minimum(begin_tile + share, end_tile)
    full = begin_tile
    if HAS_WINDOW:
        full = tl.maximum(begin_tile, tl.minimum((tl.maximum(end - window, 0) + BLOCK_N - 1) // BLOCK_N, end_tile))
    full_end = tl.maximum(full, tl.minimum((first_position + 1) // BLOCK_N, end_tile))
    return begin_tile, full, full_end, end_tile


# These differ from step to step or layer to layer: one compiled kernel serves all values.
_SPARE = ["num_rows", "window", "table_stride", "token_begin", "token_end"]
# Views into one upload of a step, and halves of one tensor whose size is the step's.
_UNALIGNED = ["query_start", "seq_lens", "block_tables", "maxima", "sums"]


@triton.jit(do_not_specialize=_SPARE, do_not_specialize_on_alignment=_UNALIGNED)
def attend(
    q, keys, values, out, partial, maxima, sums,
    query_start, seq_lens, block_tables, k_scale, v_scale,
    softmax_scale, window, num_rows, token_begin, token_end, table_stride,
    q_stride, out_stride, page_stride, head_stride,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
    HAS_WINDOW: tl.constexpr, ONE_TOKEN: tl.constexpr, IS_SPLIT: tl.constexpr, FIXED_SPLIT: tl.constexpr,
    MIN_SPLIT_TILES: tl.constexpr, HAS_SCALES: tl.constexpr, FP8_BITS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One query tile of one KV head over one split of its keys; q and out [T, NUM_HEADS * DIM].

    Only tokens token_begin : token_end are taken. IS_SPLIT: results go, not yet divided by their sums, to `partial`
    float32 [tokens, NUM_HEADS, splits, DIM], with maxima and sums in `maxima` and `sums` [tokens, NUM_HEADS, splits];
    else to `out`.
    """
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    row, first, num_queries, offset = _find_queries(query_start, num_rows, BLOCK_Q, ONE_TOKEN)
    if (offset >= num_queries) | (first + offset >= token_end) | (first + offset + BLOCK_Q <= token_begin):
        return
    context = tl.load(seq_lens + row) - num_queries
    m_index = tl.arange(0, BLOCK_M)
    d = tl.arange(0, DIM_PADDED)
    query = offset + m_index // GROUP
    position = context + query
    token = (first + query).to(tl.int64)
    head = kv_head * GROUP + m_index % GROUP
    has_row = (query < num_queries) & (m_index < BLOCK_Q * GROUP) & (token >= token_begin) & (token < token_end)
    inside = has_row[:, None] & (d < DIM)[None, :]
    q_at = (token * q_stride + head * DIM)[:, None] + d[None, :]
    q_tile = tl.load(q + q_at, mask=inside, other=0.0).to(DOT)

    end = context + tl.minimum(offset + BLOCK_Q, num_queries)
    begin, full, full_end, end_tile = _key_tiles(
        context + offset, end, window, split, tl.num_programs(2), MIN_SPLIT_TILES, FIXED_SPLIT, BLOCK_N, HAS_WINDOW
    )
    qk_scale = softmax_scale * 1.4426950408889634
    if HAS_SCALES:
        qk_scale *= tl.load(k_scale)
    if FP8_BITS:
        qk_scale *= E4M3_AS_FLOAT16
    m, total, acc = _attend_keys(
        q_tile, begin, full, full_end, end_tile, position, end, window, qk_scale, keys, values,
        block_tables + row.to(tl.int64) * table_stride, kv_head.to(tl.int64) * head_stride, page_stride,
        DIM, DIM_PADDED, BLOCK_SIZE, BLOCK_M, BLOCK_N, HAS_WINDOW, DOT, FP8_BITS,
    )  # fmt: skip
    if IS_SPLIT:
        at = ((token - token_begin) * NUM_HEADS + head) * tl.num_programs(2) + split
        tl.store(maxima + at, m, mask=has_row)
        tl.store(sums + at, total, mask=has_row)
        tl.store(partial + at[:, None] * DIM + d[None, :], acc, mask=inside & (begin < end_tile))
    else:
        _store(out, (token * out_stride + head * DIM)[:, None] + d[None, :], acc, total[:, None], v_scale, inside,
               HAS_SCALES, FP8_BITS)  # fmt: skip


@triton.jit
def _store(out, at, acc, total, v_scale, mask, HAS_SCALES: tl.constexpr, FP8_BITS: tl.constexpr):
    """acc / total, in the scale of the values, to out; 0 where a query saw nothing."""
    value = acc / tl.where(total == 0.0, 1.0, total)
    if HAS_SCALES:
        value *= tl.load(v_scale)
    if FP8_BITS:
        value *= E4M3_AS_FLOAT16
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["num_rows", "num_splits", "token_begin"],
    do_not_specialize_on_alignment=["query_start", "maxima", "sums"],
)
def merge(
    out, partial, maxima, sums, query_start, v_scale, num_rows, token_begin,
    num_splits, out_stride, NUM_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_SCALES: tl.constexpr, FP8_BITS: tl.constexpr,
):  # fmt: skip
    """One head of one token from token_begin on: the splits that `attend` left for it, put together in `out`.

    Splits are taken BLOCK_S at a time; those without keys add exact zeros, so that the number of splits around the
    ones that count does not change a bit.
    """
    token = token_begin + tl.program_id(0)
    head = tl.program_id(1)
    if token >= tl.load(query_start + num_rows):
        return
    d = tl.arange(0, DIM_PADDED)
    first = (tl.program_id(0).to(tl.int64) * NUM_HEADS + head) * num_splits
    m = float("-inf")
    total = 0.0
    acc = tl.zeros([DIM_PADDED], tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        m_part = tl.load(maxima + first + split, mask=split < num_splits, other=float("-inf"))
        total_part = tl.load(sums + first + split, mask=split < num_splits, other=0.0)
        has_keys = m_part > float("-inf")
        at = (first + split)[:, None] * DIM + d[None, :]
        part = tl.load(partial + at, mask=has_keys[:, None] & (d < DIM)[None, :], other=0.0)
        m_new = tl.maximum(m, tl.max(m_part, axis=0))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2(m_part - base)
        decay = tl.exp2(m - base)
        total = total * decay + tl.sum(total_part * weight, axis=0)
        acc = acc * decay + tl.sum(part * weight[:, None], axis=0)
        m = m_new
    at = token.to(tl.int64) * out_stride + head * DIM + d
    _store(out, at, acc, total, v_scale, d < DIM, HAS_SCALES, FP8_BITS)
