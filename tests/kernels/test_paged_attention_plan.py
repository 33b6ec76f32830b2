"""How paged attention lays a step out: each token in one tile, enough programs for the device, no splits too small."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manta.kernels.gpu import Gpu
from manta.kernels.paged_attention_plan import (
    INVARIANT_SPLIT,
    MAX_PARTIAL_VALUES,
    MAX_SPLITS,
    MIN_SPLIT_TILES,
    Plan,
    ceil_div,
    choose_num_splits,
    choose_tile,
    make_plan,
)

H200 = Gpu(90, 132)


def plan(
    query_lens: list[int], max_seq_len: int, heads: tuple[int, int, int] = (32, 8, 128), *,
    window: int | None = None, batch_invariant: bool = False,
) -> Plan:  # fmt: skip
    num_decodes = next((i for i, n in enumerate(query_lens) if n != 1), len(query_lens))
    return make_plan(
        sum(query_lens), len(query_lens), num_decodes, max(query_lens, default=1), max_seq_len, window, *heads,
        2, False, H200, batch_invariant,
    )  # fmt: skip


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.sampled_from([(32, 8), (9, 3), (71, 1), (4, 4)]))
def test_every_token_is_in_one_tile(query_lens: list[int], heads: tuple[int, int]) -> None:
    """Row r's tiles begin at query_start[r] // block_q + r: they neither overlap nor leave the grid."""
    made = plan(query_lens, 4096, (*heads, 64))
    assert made.block_q * heads[0] // heads[1] <= made.tile.block_m
    start, taken = 0, set()
    for row, count in enumerate(query_lens):
        first = row if made.one_token else start // made.block_q + row
        tiles = set(range(first, first + ceil_div(count, made.block_q)))
        assert not tiles & taken
        taken |= tiles
        start += count
    assert not taken or (min(taken) >= 0 and max(taken) < made.num_tiles)


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 400))
def test_number_of_splits(num_programs: int, num_key_tiles: int, num_slots: int) -> None:
    """No split is below the least; a device that is full, or sequences that are short, are left whole."""
    splits = choose_num_splits(num_programs, num_key_tiles, num_slots)
    assert 1 <= splits <= MAX_SPLITS
    assert splits == 1 or (splits - 1) * MIN_SPLIT_TILES < num_key_tiles
    if num_programs >= num_slots or num_key_tiles <= MIN_SPLIT_TILES:
        assert splits == 1


@pytest.mark.parametrize(
    ("num_rows", "max_seq_len", "least", "most"),
    [(1, 32768, 24, 40), (4, 32768, 6, 9), (32, 32768, 1, 2), (256, 32768, 1, 1), (1, 200, 1, 1), (1, 1000, 2, 4)],
)
def test_long_rows_fill_the_device(num_rows: int, max_seq_len: int, least: int, most: int) -> None:
    """8 KV heads a row: one long row takes about 33 splits for the 264 programs that run at once."""
    assert least <= plan([1] * num_rows, max_seq_len).num_splits <= most


def test_a_window_is_not_split_more_than_its_keys() -> None:
    assert plan([1], 100_000, window=256).num_splits <= 2
    assert plan([1], 100_000).num_splits > 20


@given(st.lists(st.integers(1, 300), min_size=1, max_size=20), st.integers(300, 20_000))
def test_batch_invariant_layout(query_lens: list[int], max_seq_len: int) -> None:
    """Tiles and the positions of splits are the same in every step; splits reach the longest sequence."""
    made = plan(query_lens, max_seq_len, batch_invariant=True)
    alone = plan([1], 300, batch_invariant=True)
    assert made.tile == alone.tile
    assert made.block_q == alone.block_q
    assert made.fixed_split == INVARIANT_SPLIT
    assert made.fixed_split % made.tile.block_n == 0
    assert not made.one_token
    assert made.num_splits * made.fixed_split >= max_seq_len


def test_partial_results_are_bounded() -> None:
    made = plan([8192] * 4, 100_000, batch_invariant=True)
    assert made.num_splits > 1
    assert made.tokens_per_launch * made.num_splits * 32 * 128 <= MAX_PARTIAL_VALUES
    assert plan([8192] * 4, 100_000).tokens_per_launch == 4 * 8192


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kind", ["decode", "mixed", "prefill"])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 8, 71])
def test_tiles_hold_a_group(group: int, head_dim: int, kind: str, capability: int) -> None:
    for element_bytes in (2, 4):
        tile = choose_tile(kind, head_dim, group, element_bytes, False, capability)
        assert tile.block_m >= group
        assert INVARIANT_SPLIT % tile.block_n == 0
        for size in (tile.block_m, tile.block_n):
            assert size >= 16
            assert size & (size - 1) == 0
