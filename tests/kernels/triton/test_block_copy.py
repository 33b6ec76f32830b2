"""Copies of blocks over all layers against torch's indexing, for block sizes in bytes that only narrow words divide."""

import pytest
import torch
from torch import Tensor

from tests.support.triton_device import DEVICE, INTERPRETED

pytest.importorskip("triton", reason="triton is not installed")
from manta.kernels.block_copy_triton import BlockCopier

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

NUM_BLOCKS = 9
SHAPES = [  # [num_kv_heads, block_size, head_dim], dtype
    ((2, 8, 20), torch.float32),
    ((1, 1, 1), torch.float16),
    ((3, 5, 7), torch.float8_e4m3fn),
    ((4, 16, 128), torch.bfloat16),
    ((1, 3, 2), torch.float16),
]


def cache(shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [tuple(torch.randn(NUM_BLOCKS, *shape).to(DEVICE, dtype) for _ in range(2)) for _ in range(3)]  # type: ignore[misc]


def same(actual: Tensor, expected: Tensor) -> bool:
    return torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
@pytest.mark.parametrize("index_type", [torch.int64, torch.int32], ids=str)
def test_copy(shape: tuple[int, ...], dtype: torch.dtype, index_type: torch.dtype) -> None:
    kv_cache = cache(shape, dtype)
    expected = [tuple(pages.clone() for pages in layer) for layer in kv_cache]
    # One source twice; pairs that are not there.
    BlockCopier(kv_cache).copy(torch.tensor([[3, 3, -1, 0, -1], [1, 8, 4, 7, -1]], dtype=index_type, device=DEVICE))
    for layer, expected_layer in zip(kv_cache, expected, strict=True):
        for pages, was in zip(layer, expected_layer, strict=True):
            index = torch.arange(NUM_BLOCKS)
            index[[1, 8, 7]] = torch.tensor([3, 3, 0])
            assert same(pages, was.view(torch.uint8)[index.to(DEVICE)])


@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_gather_and_scatter_move_blocks_between_caches(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    here, there = cache(shape, dtype), cache(shape, dtype)
    for layer in there:
        for pages in layer:
            pages.view(torch.uint8).zero_()
    sources = torch.tensor([5, 0, 7, -1], device=DEVICE)
    targets = torch.tensor([2, 8, 5, 3], device=DEVICE)
    buffer = BlockCopier(here).gather(sources)
    for i, block in enumerate(sources.tolist()[:3]):
        parts = [pages[block].flatten() for layer in here for pages in layer]
        assert same(buffer[i], torch.stack(parts))
    BlockCopier(there).scatter(buffer, torch.where(sources < 0, -1, targets))
    for mine, theirs in zip(here, there, strict=True):
        for pages, moved in zip(mine, theirs, strict=True):
            assert same(moved[targets[:3]], pages[sources[:3]])
            assert not moved.view(torch.uint8)[[0, 1, 3, 4, 6, 7]].any()


def test_blocks_that_are_read_and_written_go_through_a_buffer() -> None:
    """A swap and a chain: every source is read before any block is written."""
    kv_cache = cache((2, 4, 8), torch.float16)
    was = [tuple(pages.clone() for pages in layer) for layer in kv_cache]
    copier = BlockCopier(kv_cache)
    copier.scatter(copier.gather(torch.tensor([0, 1, 1, 2], device=DEVICE)), torch.tensor([1, 0, 2, 3], device=DEVICE))
    for layer, expected_layer in zip(kv_cache, was, strict=True):
        for pages, expected in zip(layer, expected_layer, strict=True):
            assert same(pages[:4], expected[[1, 0, 1, 2]])
