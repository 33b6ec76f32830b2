"""Root mean square normalisation on the CPU (Zhang and Sennrich 2019), alone or after adding the residual.

y = x / sqrt(mean(x ** 2) + eps) * weight
"""

import math
from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from manta.kernels.cpu_scalars import KINDS, jit, load, num_chunks, store

_ZERO = np.float32(0)


@jit(forceinline=True)
def _normalise(x: Any, weight: Any, out: Any, at: Any, size: Any, squares: Any, eps: Any, kind: Any) -> None:
    scale = np.float32(1.0 / math.sqrt(squares / size + eps))
    for i in range(size):
        store(out, at + i, load(x, at + i, kind) * scale * load(weight, i, kind), kind)


@jit()
def _norm_rows(begin: Any, end: Any, x: Any, weight: Any, out: Any, size: Any, eps: Any, kind: Any) -> None:
    for row in range(begin, end):
        at = row * size
        squares = _ZERO
        for i in range(size):
            value = load(x, at + i, kind)
            squares += value * value
        _normalise(x, weight, out, at, size, squares, eps, kind)


@jit()
def _add_norm_rows(
    begin: Any, end: Any, x: Any, residual: Any, weight: Any, out: Any, size: Any, eps: Any, kind: Any
) -> None:
    for row in range(begin, end):
        at = row * size
        squares = _ZERO
        for i in range(size):
            value = load(x, at + i, kind) + load(residual, at + i, kind)
            store(residual, at + i, value, kind)
            squares += value * value
        _normalise(residual, weight, out, at, size, squares, eps, kind)


@jit(parallel=True)
def _norm_parallel(chunks: Any, rows: Any, x: Any, weight: Any, out: Any, size: Any, eps: Any, kind: Any) -> None:
    for c in prange(chunks):
        _norm_rows(rows * c // chunks, rows * (c + 1) // chunks, x, weight, out, size, eps, kind)


@jit(parallel=True)
def _add_norm_parallel(
    chunks: Any, rows: Any, x: Any, residual: Any, weight: Any, out: Any, size: Any, eps: Any, kind: Any
) -> None:
    for c in prange(chunks):
        _add_norm_rows(rows * c // chunks, rows * (c + 1) // chunks, x, residual, weight, out, size, eps, kind)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [T, hidden], contiguous; weight: [hidden] of the same dtype. Returns [T, hidden]."""
    assert x.is_contiguous()
    assert x.dtype == weight.dtype
    rows, size = x.shape
    out = torch.empty_like(x)
    arguments = (rows, x.data_ptr(), weight.data_ptr(), out.data_ptr(), size, eps, KINDS[x.dtype])
    chunks = num_chunks(4 * rows * size)
    if chunks == 1:
        _norm_rows(0, *arguments)
    else:
        _norm_parallel(chunks, *arguments)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x in place, then the norm of it. x, residual: [T, hidden], contiguous. Returns [T, hidden]."""
    assert x.is_contiguous()
    assert residual.is_contiguous()
    assert x.dtype == residual.dtype == weight.dtype
    rows, size = x.shape
    out = torch.empty_like(x)
    addresses = (x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr())
    chunks = num_chunks(5 * rows * size)
    if chunks == 1:
        _add_norm_rows(0, rows, *addresses, size, eps, KINDS[x.dtype])
    else:
        _add_norm_parallel(chunks, rows, *addresses, size, eps, KINDS[x.dtype])
    return out
