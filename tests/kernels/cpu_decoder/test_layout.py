"""Pages of the CPU decoder: the layout itself, and that what the kernel writes is in it."""

import pytest
import torch
from torch import Tensor

from manta.kernels import reference
from manta.kernels.cpu_decoder import layout
from tests.support.decoder_kernels import INFINITY, PLAIN, PagedHeads, Variant
from tests.support.paging import PagedSequences
from tests.support.tolerances import KERNEL, relative_error

BLOCK_SIZES = [8, 16, 32, 64]
DIMS = [16, 20, 64, 80, 96, 128, 256]
DTYPES = [variant.dtype for variant in PLAIN]


def quarter_turns(num_positions: int, dim: int) -> Tensor:
    """A table that rotates by multiples of 90 degrees, so that results are exact in every dtype."""
    turns = torch.randint(0, 4, (num_positions, dim // 2))
    cos, sin = torch.tensor([1.0, 0, -1, 0])[turns], torch.tensor([0, 1.0, 0, -1])[turns]
    return torch.cat((cos, sin), dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_from_pages_undoes_to_pages(block_size: int, dim: int, dtype: torch.dtype) -> None:
    keys, values = torch.randn(3, 2, block_size, dim).to(dtype), torch.randn(3, 2, block_size, dim).to(dtype)
    pages = layout.to_pages(keys, values)
    assert all(page.shape == (3, 2, *layout.page_shape(block_size, dim)) for page in pages)
    for actual, expected in zip(layout.from_pages(*pages, block_size, dim), (keys, values), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("block_size", "dim"), [(8, 20), (32, 16), (16, 48)])
def test_where_elements_lie(block_size: int, dim: int) -> None:
    """Element by element what `layout` says in words."""
    tokens, dims = layout.page_shape(block_size, dim)
    keys, values = torch.randn(1, 1, block_size, dim), torch.randn(1, 1, block_size, dim)
    wide_keys, wide_values = (page.flatten().tolist() for page in layout.to_pages(keys, values))
    paired_keys, paired_values = (page.flatten() for page in layout.to_pages(keys.bfloat16(), values.bfloat16()))
    assert len(wide_keys) == tokens * dims
    for t in range(block_size):
        for d in range(dim):
            assert wide_keys[(t // 16 * dims + d) * 16 + t % 16] == keys[0, 0, t, d]
            assert wide_values[t * dims + d] == values[0, 0, t, d]
            at_key = ((t // 16 * (dims // 2) + d // 2) * 16 + t % 16) * 2 + d % 2
            assert paired_keys[at_key] == keys[0, 0, t, d].bfloat16()
            assert paired_values[(t // 2 * dims + d) * 2 + t % 2] == values[0, 0, t, d].bfloat16()


@pytest.mark.parametrize("variant", PLAIN, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_written_tokens_are_where_the_layout_has_them(block_size: int, dim: int, variant: Variant) -> None:
    heads = PagedHeads(variant, 3, 2, dim, block_size, num_blocks=24)
    sequences = PagedSequences(block_size, num_blocks=24)
    table = quarter_turns(96, dim)
    keys, values = (torch.zeros(24, 2, block_size, dim, dtype=variant.dtype) for _ in range(2))
    for rows in ([(0, 65), (1, 1), (2, 18)], [(1, 1), (2, 1), (0, 5), (3, 16)]):
        metadata = sequences.step(rows)
        qkv = torch.randn(metadata.positions.numel(), heads.qkv_size)
        expected = qkv.clone()
        reference.rope_kv_write(expected, table[metadata.positions], metadata.slot_mapping, keys, values)
        heads.write(qkv, metadata, table, num_threads=3)
        assert torch.equal(qkv[:, : 3 * dim], expected[:, : 3 * dim])
        for actual, page in zip((heads.keys, heads.values), layout.to_pages(keys, values), strict=True):
            assert torch.equal(actual, page)


@pytest.mark.parametrize("variant", PLAIN, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim"), [(6, 2, 20), (1, 1, 16), (9, 3, 64), (4, 4, 256)])
def test_norms_and_rotation(num_heads: int, num_kv_heads: int, dim: int, variant: Variant) -> None:
    heads = PagedHeads(variant, num_heads, num_kv_heads, dim, 8, num_blocks=12)
    metadata = PagedSequences(8, num_blocks=12).step([(0, 1), (1, 19), (2, 7)])
    table = torch.randn(19, dim // 2).sin().repeat(1, 2)
    norms = torch.rand(dim) + 0.5, torch.rand(dim) + 0.5
    qkv = torch.randn(27, heads.qkv_size)
    expected = qkv.clone()
    keys, values = (torch.zeros(12, num_kv_heads, 8, dim, dtype=variant.dtype) for _ in range(2))
    reference.rope_kv_write(expected, table[metadata.positions], metadata.slot_mapping, keys, values, *norms, 1e-6)
    heads.write(qkv, metadata, table, *norms, eps=1e-6)
    written_keys, written_values = heads.unpaged()
    assert relative_error(qkv[:, : num_heads * dim], expected[:, : num_heads * dim]) < KERNEL[torch.float32]
    assert relative_error(written_keys, keys) < KERNEL[variant.dtype]
    assert torch.equal(written_values, values)


@pytest.mark.parametrize("variant", PLAIN, ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_token_behind_a_sequence_has_no_infinite_values(block_size: int, variant: Variant) -> None:
    """Tiles read tokens in pairs; the pair of a last token is finite whatever was in the page before."""
    heads = PagedHeads(variant, 2, 1, 16, block_size, num_blocks=20, filler=INFINITY)
    sequences = PagedSequences(block_size, num_blocks=20)
    for rows in ([(0, 7), (1, 1), (2, 4)], [(0, 1), (1, 1), (2, 1), (3, 3)], [(0, 1), (1, 9), (2, 2), (3, 1)]):
        metadata = sequences.step(rows)
        heads.write(torch.randn(metadata.positions.numel(), heads.qkv_size), metadata)
        _, values = heads.unpaged()
        for row, length in enumerate(metadata.seq_lens.tolist()):
            blocks = metadata.block_tables[row, : -(-length // block_size)].long()
            mine = values[blocks, 0].flatten(0, 1)
            assert mine[: length + length % 2].isfinite().all()
            assert mine[length + length % 2 :].isinf().all()  # or this test says nothing
