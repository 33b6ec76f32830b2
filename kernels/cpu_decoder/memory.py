"""Memory in large pages: a step reads all weights and much of the KV cache, and with pages of 4 KiB a good part of that
time would go into finding out where they are."""

import math
import mmap
from typing import Any

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 1 << 21


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros for which the operating system is asked to use pages of 2 MiB. Takes memory only as it is written."""
    num_bytes = math.prod(shape) * dtype.itemsize
    advice: Any = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or num_bytes < _HUGE_PAGE_BYTES:
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(advice)
    except OSError:  # a kernel without them
        return torch.zeros(shape, dtype=dtype)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE_BYTES
    return whole[start : start + num_bytes].view(dtype).view(shape)


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A copy of the tensor in such memory; a small one as it is."""
    if tensor.numel() * tensor.element_size() < _HUGE_PAGE_BYTES:
        return tensor
    return zeros(tuple(tensor.shape), tensor.dtype).copy_(tensor)
