"""Memory for weights in large pages: reading a model's weights touches every page of them in every step."""

import mmap
from typing import Any

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 1 << 21


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A copy of the tensor in memory for which the kernel is asked to use pages of 2 MiB; a small one as it is."""
    num_bytes = tensor.numel() * tensor.element_size()
    advice: Any = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or num_bytes < _HUGE_PAGE_BYTES:
        return tensor
    memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(advice)
    except OSError:
        return tensor
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE_BYTES
    copy = whole[start : start + num_bytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
