"""The inside of attention: a tile of MAX_ROWS query rows over a chunk of a sequence, and the memory this works in.

Scores of a tile stay in the first-level cache between the two products. Where many tiles follow one another over the
same chunk, its keys and values are widened to float32 once for all of them, into the second-level cache.
"""

from typing import Any

import numpy as np

from manta.kernels.cpu_decoder.tiles import COLUMNS, LANES, MAX_ROWS, multiply_tile, widen_panel
from manta.kernels.cpu_decoder.vectors import exp_row, greatest, shrink_rows
from manta.kernels.cpu_scalars import is_paired, item_bytes, jit, load, load_int64, store, store_int64

QUERY_ROWS = 384  # queries times heads of an item, at most, unless one query has more heads
MIN_WIDE_ROWS = 96  # for fewer, widening apart costs more than it saves (measured: 0.95 at 48 rows, 1.06 at 384)

_CHUNK_ELEMENTS = 1 << 15  # of keys and of values; 256 KiB once they are widened
_MIN_CHUNK_TOKENS, _MAX_CHUNK_TOKENS = 128, 512
_LINE_BYTES = 64
_AHEAD_BYTES = 2048  # how far before their use widened values are fetched

# Where things are in a thread's own memory, int64 each, at its beginning
(
    SEGMENT, QUERIES, ACC, ACC_STRIDE, SCORES, WEIGHTS, STRIDE, TOP, NORM, NOW, SHRINK, KEY_PAGES, VALUE_PAGES,
    WIDE_KEYS, WIDE_VALUES, WIDE_COLUMN_BYTES, IS_WIDE,
) = range(17)  # fmt: skip
_NUM_PLACES = 17

_F32 = np.float32(0)
_ZERO, _ONE = np.float32(0), np.float32(1)
LOWEST = np.float32(-1e30)


def chunk_pages(page_tokens: int, page_dims: int) -> int:
    """Pages of a chunk; an even count, because a tile takes two columns of 16 tokens."""
    tokens = max(_MIN_CHUNK_TOKENS, min(_MAX_CHUNK_TOKENS, _CHUNK_ELEMENTS // page_dims))
    return max(2 if page_tokens == LANES else 1, tokens // page_tokens // 2 * 2)


def scratch_bytes(group: int, page_tokens: int, page_dims: int) -> int:
    """What `lay_out` needs of a thread's own memory; see there for what it is."""
    pages = chunk_pages(page_tokens, page_dims)
    rows = max(QUERY_ROWS, group) + MAX_ROWS
    columns, dims = (-(-size // COLUMNS) * COLUMNS for size in (pages * page_tokens, page_dims))
    floats = rows * (page_dims + dims) + 2 * MAX_ROWS * (columns + COLUMNS) + columns * (page_dims + dims)
    floats += 2 * (rows // MAX_ROWS + 2) * LANES
    return 4 * floats + 8 * (_NUM_PLACES + 2 * pages) + 8 * _LINE_BYTES


@jit()
def _aligned(address: Any) -> Any:
    return (address + _LINE_BYTES - 1) // _LINE_BYTES * _LINE_BYTES


@jit()
def lay_out(
    work: Any, rows: Any, group: Any, page_tokens: Any, page_dims: Any, pages: Any, left: Any, kind: Any
) -> None:
    """Fills in the table of places at the beginning of the thread's memory `work`, for an item of so many rows.

    Queries [rows, page_dims] of kind `left`; accumulators float32 [rows, dims]; of one tile scores float32 and weights
    of kind `left` [MAX_ROWS, columns]; maxima and sums by row, LANES for each tile; addresses of a chunk's pages; its
    keys float32 [columns / 32, page_dims, 32] and values [dims / 32, columns, 32]. Tiles write up to MAX_ROWS rows.
    """
    space = max(QUERY_ROWS, group) + MAX_ROWS
    lanes_bytes = 4 * LANES * (space // MAX_ROWS + 1)
    columns = (pages * page_tokens + COLUMNS - 1) // COLUMNS * COLUMNS
    dims = (page_dims + COLUMNS - 1) // COLUMNS * COLUMNS
    stride = columns + COLUMNS  # rows of a tile do not fall into one set of the cache
    key_pages = _aligned(work + 8 * _NUM_PLACES)
    top = _aligned(key_pages + 16 * pages)
    queries = top + 2 * lanes_bytes + 8 * LANES
    acc = _aligned(queries + 4 * space * page_dims)
    scores = _aligned(acc + 4 * space * dims)
    weights = scores if item_bytes(left) == 4 else scores + 4 * MAX_ROWS * stride
    wide = _aligned(weights + 4 * MAX_ROWS * stride)
    store_int64(work, KEY_PAGES, key_pages)
    store_int64(work, VALUE_PAGES, key_pages + 8 * pages)
    store_int64(work, TOP, top)
    store_int64(work, NORM, top + lanes_bytes)
    store_int64(work, NOW, top + 2 * lanes_bytes)
    store_int64(work, SHRINK, top + 2 * lanes_bytes + 4 * LANES)
    store_int64(work, QUERIES, queries)
    store_int64(work, ACC, acc)
    store_int64(work, ACC_STRIDE, dims)
    store_int64(work, SCORES, scores)
    store_int64(work, WEIGHTS, weights)
    store_int64(work, STRIDE, stride)
    store_int64(work, WIDE_KEYS, wide)
    store_int64(work, WIDE_VALUES, wide + 4 * columns * page_dims)
    store_int64(work, WIDE_COLUMN_BYTES, 4 * COLUMNS * columns)
    store_int64(work, IS_WIDE, rows >= MIN_WIDE_ROWS and item_bytes(kind) == 2 and item_bytes(left) == 4)
    for i in range((rows + MAX_ROWS - 1) // MAX_ROWS * LANES):
        store(top, i, LOWEST, _F32)
        store(top + lanes_bytes, i, _ZERO, _F32)
    for i in range(rows * dims):
        store(acc, i, _ZERO, _F32)


@jit()
def _panel(pages: Any, panel: Any, panels_per_page: Any, panel_bytes: Any) -> Any:
    """The address of 16 tokens of a chunk's keys."""
    return load_int64(pages, panel // panels_per_page) + panel % panels_per_page * panel_bytes


@jit()
def widen_chunk(
    work: Any, num_pages: Any, num_tokens: Any, block_size: Any, page_tokens: Any, dim: Any, page_dims: Any, kind: Any
) -> None:
    """Keys and values of a chunk of num_tokens as float32, laid out as `lay_out` says."""
    panels_per_page = page_tokens // LANES
    panel_bytes = LANES * page_dims * item_bytes(kind)
    num_panels = num_pages * panels_per_page
    pages, wide = load_int64(work, KEY_PAGES), load_int64(work, WIDE_KEYS)
    for panel in range(0, num_panels, 2):
        first = _panel(pages, panel, panels_per_page, panel_bytes)
        second = _panel(pages, min(panel + 1, num_panels - 1), panels_per_page, panel_bytes)
        widen_panel(first, dim // 2, 2 * LANES * item_bytes(kind), second - first, wide, kind)
        wide += 4 * COLUMNS * page_dims
    pages, wide = load_int64(work, VALUE_PAGES), load_int64(work, WIDE_VALUES)
    pair_bytes = 2 * page_dims * item_bytes(kind)
    lanes_bytes = LANES * item_bytes(kind) * (2 if is_paired(kind) else 1)
    for column in range(0, page_dims // LANES, 2):
        second = lanes_bytes if column + 1 < page_dims // LANES else 0
        for page in range(num_pages):
            pairs = (min(num_tokens - page * block_size, block_size) + 1) // 2
            first = load_int64(pages, page) + column * lanes_bytes
            widen_panel(first, pairs, pair_bytes, second, wide + page * block_size * 4 * COLUMNS, kind)
        wide += load_int64(work, WIDE_COLUMN_BYTES)


@jit()
def score_tile(
    work: Any, row: Any, count: Any, num_panels: Any, dim: Any, page_dims: Any, page_tokens: Any, left: Any, kind: Any
) -> None:
    """scores [count, num_panels * 16] = queries row : row + count @ keys"""
    segment = work + 8 * SEGMENT
    q = load_int64(work, QUERIES) + item_bytes(left) * row * page_dims
    scores, stride = load_int64(work, SCORES), load_int64(work, STRIDE)
    if load_int64(work, IS_WIDE):
        wide = load_int64(work, WIDE_KEYS)
        for panel in range(0, num_panels, 2):
            store_int64(segment, 0, wide)
            wide += 4 * COLUMNS * page_dims
            multiply_tile(
                count, q, page_dims, segment, 1, 0, 4 * LANES, 8 * COLUMNS, dim // 2, 4 * COLUMNS * page_dims,
                scores + 4 * panel * LANES, stride, 0, _F32, _F32,
            )  # fmt: skip
        return
    pages = load_int64(work, KEY_PAGES)
    panels_per_page = page_tokens // LANES
    panel_bytes = LANES * page_dims * item_bytes(kind)
    page_bytes = page_tokens * page_dims * item_bytes(kind)  # the next head's page is fetched meanwhile
    for panel in range(0, num_panels, 2):
        first = _panel(pages, panel, panels_per_page, panel_bytes)
        second = _panel(pages, min(panel + 1, num_panels - 1), panels_per_page, panel_bytes)
        store_int64(segment, 0, first)
        multiply_tile(
            count, q, page_dims, segment, 1, 0, second - first, 2 * LANES * item_bytes(kind), dim // 2, page_bytes,
            scores + 4 * panel * LANES, stride, 0, left, kind,
        )  # fmt: skip


@jit()
def add_tile(
    work: Any, row: Any, count: Any, num_tokens: Any, block_size: Any, page_dims: Any, left: Any, kind: Any
) -> None:
    """Accumulators row : row + count += weights [count, num_tokens] @ values"""
    segment = work + 8 * SEGMENT
    weights, stride = load_int64(work, WEIGHTS), load_int64(work, STRIDE)
    acc_stride = load_int64(work, ACC_STRIDE)
    out = load_int64(work, ACC) + 4 * row * acc_stride
    if load_int64(work, IS_WIDE):
        wide = load_int64(work, WIDE_VALUES)
        for column in range(0, page_dims // LANES, 2):
            store_int64(segment, 0, wide)
            wide += load_int64(work, WIDE_COLUMN_BYTES)
            multiply_tile(
                count, weights, stride, segment, 1, 0, 4 * LANES, 8 * COLUMNS, (num_tokens + 1) // 2, _AHEAD_BYTES,
                out + 4 * column * LANES, acc_stride, 1, _F32, _F32,
            )  # fmt: skip
        return
    pages = load_int64(work, VALUE_PAGES)
    step = 2 * page_dims * item_bytes(kind)
    lanes_bytes = LANES * item_bytes(kind) * (2 if is_paired(kind) else 1)
    ahead = block_size * page_dims * item_bytes(kind)
    full = num_tokens // block_size
    rest = (num_tokens - full * block_size + 1) // 2
    for column in range(0, page_dims // LANES, 2):
        first = column * lanes_bytes
        second = first + lanes_bytes if column + 1 < page_dims // LANES else first
        if full:
            multiply_tile(
                count, weights, stride, pages, full, first, second, step, block_size // 2, ahead,
                out + 4 * column * LANES, acc_stride, 1, left, kind,
            )  # fmt: skip
        if rest:
            multiply_tile(
                count, weights + item_bytes(left) * full * block_size, stride, pages + 8 * full, 1, first, second, step,
                rest, ahead, out + 4 * column * LANES, acc_stride, 1, left, kind,
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
def weigh_tile(
    work: Any, tile: Any, count: Any, group: Any, position: Any, window: Any, base: Any, num_tokens: Any,
    page_dims: Any, left: Any,
) -> None:  # fmt: skip
    """Takes the scores of tokens base : base + num_tokens into each row's maximum, sum and accumulator.

    position: of the item's first query. In loops of few dependences over rows, so that what a row waits for the next
    ones fill.
    """
    scores, weights, stride = load_int64(work, SCORES), load_int64(work, WEIGHTS), load_int64(work, STRIDE)
    top, norm = load_int64(work, TOP) + 4 * LANES * tile, load_int64(work, NORM) + 4 * LANES * tile
    now, shrink = load_int64(work, NOW), load_int64(work, SHRINK)
    acc_stride = load_int64(work, ACC_STRIDE)
    first = tile * MAX_ROWS
    acc = load_int64(work, ACC) + 4 * first * acc_stride
    num_vectors = (num_tokens + LANES - 1) // LANES
    columns = num_vectors * LANES
    for i in range(count):
        row = scores + 4 * i * stride
        low, high = _seen(position + (first + i) // group, window, base, num_tokens)
        _fill_outside(row, low, high, columns, LOWEST, _F32)
        store(now, i, max(load(top, i, _F32), greatest(row, num_vectors)), _F32)
    shrink_rows(top, now, shrink, 1)
    for i in range(count):
        row = weights + item_bytes(left) * i * stride
        low, high = _seen(position + (first + i) // group, window, base, num_tokens)
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
def close_gaps(work: Any, count: Any, num_pages: Any, page_tokens: Any, block_size: Any) -> None:
    """Pages smaller than a panel leave columns unused; moves the scores together."""
    scores, stride = load_int64(work, SCORES), load_int64(work, STRIDE)
    for i in range(count):
        for page in range(1, num_pages):
            for t in range(block_size):
                value = load(scores, i * stride + page * page_tokens + t, _F32)
                store(scores, i * stride + page * block_size + t, value, _F32)
