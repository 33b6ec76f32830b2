"""The items of a step cover every query and key exactly once, whatever the step."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.kernels.cpu_decoder import items
from manta.kernels.cpu_decoder.attention import (
    ITEM_BEGIN,
    ITEM_END,
    ITEM_FIRST_QUERY,
    ITEM_NUM_QUERIES,
    ITEM_PART,
    ITEM_ROW,
)
from manta.kernels.cpu_decoder.attention_tile import QUERY_ROWS
from manta.kernels.cpu_decoder.items import attention_items
from manta.kernels.metadata import AttentionMetadata

Rows = list[tuple[int, int]]  # (tokens before this step, tokens of this step)


def metadata_of(rows: Rows, block_size: int) -> AttentionMetadata:
    """Only what cutting into items reads is filled in."""
    lengths = [new for _, new in rows]
    seq_lens = [before + new for before, new in rows]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return AttentionMetadata(
        query_start=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_tables=torch.zeros(len(rows), 1, dtype=torch.int32),
        slot_mapping=torch.zeros(sum(lengths), dtype=torch.int64),
        positions=torch.zeros(sum(lengths), dtype=torch.int64),
        num_decodes=next((i for i, new in enumerate(lengths) if new != 1), len(rows)),
        max_query_len=max(lengths),
        max_seq_len=max(seq_lens),
        block_size=block_size,
    )


def check(rows: Rows, group: int, num_threads: int, block_size: int) -> tuple[int, int]:
    """Counts how often each pair of query and key is computed; the number of items and of parts."""
    table, joins, num_parts = attention_items(metadata_of(rows, block_size), group, num_threads)
    assert table.dtype == joins.dtype == np.int64
    assert table.flags.c_contiguous
    assert joins.flags.c_contiguous
    computed = [np.zeros((new, before + new), np.int64) for before, new in rows]
    part_rows = {}
    for item in table.tolist():
        row, first, count = item[ITEM_ROW], item[ITEM_FIRST_QUERY], item[ITEM_NUM_QUERIES]
        before, new = rows[row]
        assert 0 <= first < first + count <= new
        assert count * group <= max(QUERY_ROWS, group), "more than the memory of a thread holds"
        begin, end = item[ITEM_BEGIN], min(item[ITEM_END], before + first + count)
        assert 0 <= begin < end <= before + new
        assert begin % block_size == 0
        computed[row][first : first + count, begin:end] += 1
        if item[ITEM_PART] >= 0:
            assert (first, count, new) == (0, 1, 1)  # joins know tokens, not tiles of queries
            assert item[ITEM_PART] not in part_rows
            part_rows[item[ITEM_PART]] = row
    for counts, (before, new) in zip(computed, rows, strict=True):
        causal = np.tril(np.ones((new, before + new), np.int64), before)
        np.testing.assert_array_equal(counts * causal, causal)
    assert sorted(part_rows) == list(range(num_parts))
    assert len(joins) == (len(rows) if num_parts else 0)
    starts = np.concatenate([[0], np.cumsum([new for _, new in rows])])
    joined = []
    for token, first_part, count in joins.tolist():
        row = int(np.searchsorted(starts, token, side="right")) - 1
        parts = list(range(first_part, first_part + count))
        assert count > 0
        assert all(part_rows[part] == row for part in parts)
        joined += parts
    assert sorted(joined) == list(range(num_parts))
    return len(table), num_parts


decode_rows = st.lists(st.integers(0, 5000).map(lambda before: (before, 1)), min_size=1, max_size=20)
any_rows = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 130)), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    rows=decode_rows | any_rows,
    group=st.sampled_from([1, 2, 3, 7, 8, 48, 49, 64]),
    num_threads=st.sampled_from([1, 2, 3, 16, 64]),
    block_size=st.sampled_from([8, 16, 32, 64]),
)
def test_every_pair_is_computed_once(rows: Rows, group: int, num_threads: int, block_size: int) -> None:
    check(rows, group, num_threads, block_size)


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 511, 512, 513, 767, 1023, 1024, 4097])
def test_one_sequence(length: int) -> None:
    """A single row's long sequence is shared by threads, a short one is not; parts are no shorter than they may be."""
    for num_threads in (1, 2, 4, 13):
        num_items, num_parts = check([(length - 1, 1)], 3, num_threads, 16)
        is_split = num_threads > 1 and length >= 2 * items.MIN_PART_TOKENS
        assert (num_parts > 1) == is_split
        assert num_items <= max(1, length // items.MIN_PART_TOKENS)


def test_long_and_short_sequences_together() -> None:
    num_items, num_parts = check([(3000, 1), (0, 1), (40, 1)], 4, 4, 8)
    assert num_items == num_parts > 3


def test_enough_rows_are_not_split() -> None:
    assert check([(3000, 1)] * 16, 4, 4, 8) == (16, 0)


def test_tiles_with_most_work_come_first() -> None:
    table, _, _ = attention_items(metadata_of([(0, 1), (500, 100), (0, 64)], 16), 3, 2)
    work = table[:, ITEM_NUM_QUERIES] * table[:, ITEM_END]
    assert (np.diff(work) <= 0).all()
