"""Cuts the attention of a step into items of work for threads: see `attention`."""

import numpy as np
from numpy.typing import NDArray

from manta.kernels.cpu_decoder.attention import (
    ITEM_BEGIN,
    ITEM_END,
    ITEM_FIELDS,
    ITEM_FIRST_QUERY,
    ITEM_NUM_QUERIES,
    ITEM_PART,
    ITEM_ROW,
    ITEMS_PER_THREAD,
)
from manta.kernels.cpu_decoder.attention_tile import QUERY_ROWS
from manta.kernels.metadata import AttentionMetadata

Table = NDArray[np.int64]
Work = tuple[Table, Table, int]  # items [n, ITEM_FIELDS], joins [m, 3] (token, first part, number of parts), parts

MIN_QUERY_ROWS = 48  # smaller items read keys and values more often than their balance is worth
MIN_PART_TOKENS = 256  # a shorter part costs more to join than it saves

NO_JOINS: Table = np.zeros((0, 3), np.int64)


def attention_items(metadata: AttentionMetadata, group: int, num_threads: int) -> Work:
    """A step's attention for so many threads."""
    seq_lens = metadata.seq_lens.numpy().astype(np.int64)
    if metadata.max_query_len > 1:
        return _query_tiles(metadata, seq_lens, group, num_threads), NO_JOINS, 0
    num_parts = -(-num_threads * ITEMS_PER_THREAD // seq_lens.size)
    if num_parts > 1 and num_threads > 1 and metadata.max_seq_len >= 2 * MIN_PART_TOKENS:
        return _parts(seq_lens, num_parts, metadata.block_size)
    return single_queries(metadata), NO_JOINS, 0


def single_queries(metadata: AttentionMetadata) -> Table:
    """Rows of one token each, every one a whole."""
    seq_lens = metadata.seq_lens.numpy()
    items = np.zeros((seq_lens.size, ITEM_FIELDS), np.int64)
    items[:, ITEM_ROW] = np.arange(seq_lens.size)
    items[:, ITEM_NUM_QUERIES] = 1
    items[:, ITEM_END] = seq_lens
    items[:, ITEM_PART] = -1
    return items


def _queries_per_item(lengths: Table, group: int, num_threads: int) -> int:
    """As many as fit, or fewer where long rows would make too few items for all threads."""
    rows, lengths = QUERY_ROWS, lengths[lengths > 1]
    while rows > MIN_QUERY_ROWS and -(-lengths * group // rows).sum() < ITEMS_PER_THREAD * num_threads:
        rows //= 2
    return max(1, rows // group)


def _query_tiles(metadata: AttentionMetadata, seq_lens: Table, group: int, num_threads: int) -> Table:
    """Every row cut into items of queries; those with most work first."""
    lengths = np.diff(metadata.query_start.numpy()).astype(np.int64)
    tile = _queries_per_item(lengths, group, num_threads)
    tiles = -(-lengths // tile)
    rows = np.repeat(np.arange(lengths.size), tiles)
    first = (np.arange(rows.size) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * tile
    count = np.minimum(tile, lengths[rows] - first)
    end = seq_lens[rows] - lengths[rows] + first + count
    items = np.stack([rows, first, count, np.zeros_like(rows), end, np.full_like(rows, -1)], axis=1)
    return np.ascontiguousarray(items[np.argsort(-count * end, kind="stable")])


def _parts(seq_lens: Table, num_parts: int, block_size: int) -> Work:
    """Every row's sequence cut into parts of whole blocks, the same number for all rows of about a length."""
    parts = np.clip(seq_lens // MIN_PART_TOKENS, 1, num_parts)
    length = -(-seq_lens // (parts * block_size)) * block_size
    parts = -(-seq_lens // length)
    total = int(parts.sum())
    first = np.cumsum(parts) - parts
    rows = np.repeat(np.arange(seq_lens.size), parts)
    begin = (np.arange(total) - first[rows]) * length[rows]
    items = np.zeros((total, ITEM_FIELDS), np.int64)
    items[:, ITEM_ROW] = rows
    items[:, ITEM_FIRST_QUERY] = 0
    items[:, ITEM_NUM_QUERIES] = 1
    items[:, ITEM_BEGIN] = begin
    items[:, ITEM_END] = np.minimum(begin + length[rows], seq_lens[rows])
    items[:, ITEM_PART] = np.arange(total)
    joins = np.stack([np.arange(seq_lens.size), first, parts], axis=1)
    return items, np.ascontiguousarray(joins), total
