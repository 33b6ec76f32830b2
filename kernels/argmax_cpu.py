"""The best token of each row on the CPU, in one pass by the calling thread: waking others costs more than it saves, and
on a busy host a great deal more."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from manta.kernels.cpu_decoder.vectors import LANES, greatest
from manta.kernels.cpu_scalars import jit, load, store_int64

_F32 = np.float32(0)
_LOWEST = np.float32(-np.inf)
_BLOCK = 64 * LANES


@jit()
def best_token(logits: Any, size: Any) -> Any:
    """The first of the greatest of `size` float32; NaNs are passed over."""
    best, best_block = _LOWEST, 0
    whole = size // _BLOCK * _BLOCK
    for block in range(0, whole, _BLOCK):
        value = greatest(logits + 4 * block, _BLOCK // LANES)
        if value > best:
            best, best_block = value, block
    index = best_block
    for i in range(best_block, min(best_block + _BLOCK, size)):
        if load(logits, i, _F32) == best:
            index = i
            break
    for i in range(whole, size):
        if load(logits, i, _F32) > best:
            best, index = load(logits, i, _F32), i
    return index


@jit()
def _rows(logits: Any, stride: Any, rows: Any, size: Any, out: Any) -> None:
    for row in range(rows):
        store_int64(out, row, best_token(logits + 4 * row * stride, size))


def argmax(logits: Tensor) -> Tensor:
    """logits float32 [N, vocab], rows contiguous -> int64 [N], the first of equal ones; NaNs are passed over."""
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    out = torch.empty(logits.shape[0], dtype=torch.int64)
    _rows(logits.data_ptr(), logits.stride(0), logits.shape[0], logits.shape[1], out.data_ptr())
    return out
