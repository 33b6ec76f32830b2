"""Memory in large pages: a step reads all weights and much of the KV cache, and with pages of 4 KiB a good part of that
time would go into finding out where they are."""

import ctypes
import math
import mmap
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 1 << 21
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14, which Python's mmap does not name


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros for which the operating system is asked to use pages of 2 MiB. Takes memory only as it is written."""
    num_bytes = math.prod(shape) * dtype.itemsize
    advice: Any = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or num_bytes < HUGE_PAGE_BYTES:
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(advice)
    except OSError:  # a kernel without them
        return torch.zeros(shape, dtype=dtype)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE_BYTES
    return whole[start : start + num_bytes].view(dtype).view(shape)


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A copy of the tensor in such memory; a small one as it is."""
    if tensor.numel() * tensor.element_size() < HUGE_PAGE_BYTES:
        return tensor
    return zeros(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def populate(address: int, num_bytes: int) -> bool:
    """Makes the operating system give the memory of this range now, in place of when it is first written; contents stay
    as they are. False where it cannot be asked to."""
    madvise = _madvise()
    return madvise is not None and madvise(address, num_bytes, _POPULATE_WRITE) == 0


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
