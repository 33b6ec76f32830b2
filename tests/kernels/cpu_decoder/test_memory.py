"""Memory in large pages behaves as any other."""

import gc
import mmap

import pytest
import torch

from manta.kernels.cpu_decoder.memory import in_huge_pages, zeros

HUGE_PAGE_BYTES = 1 << 21


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(3,), (5, 7), (1025, 1024), (3, 1 << 20)])
def test_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = zeros(shape, dtype)
    assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
    assert tensor.is_contiguous()
    assert not tensor.any()
    tensor.fill_(3)
    assert (tensor == 3).all()
    if tensor.nbytes >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        assert tensor.data_ptr() % HUGE_PAGE_BYTES == 0


@pytest.mark.parametrize("size", [10, 1 << 20])
def test_copies(size: int) -> None:
    tensor = torch.randn(2, size)
    copy = in_huge_pages(tensor)
    assert torch.equal(copy, tensor)
    assert (copy.data_ptr() != tensor.data_ptr()) == (tensor.nbytes >= HUGE_PAGE_BYTES)
    before = tensor.clone()
    del tensor
    gc.collect()
    assert torch.equal(copy, before)  # it holds its own memory


def test_without_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert not zeros((2, 1 << 20), torch.float32).any()
