"""The gated activation of a SwiGLU layer (Shazeer 2020, "GLU Variants Improve Transformer") on the CPU.

y = silu(gate) * up,  silu(x) = x / (1 + e ** -x)
"""

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from manta.kernels.cpu_scalars import KINDS, exp, jit, load, num_chunks, store

_ONE = np.float32(1)


@jit()
def _rows(begin: Any, end: Any, gate_up: Any, out: Any, size: Any, kind: Any) -> None:
    for row in range(begin, end):
        at = row * size
        for i in range(size):
            gate = load(gate_up, 2 * at + i, kind)
            up = load(gate_up, 2 * at + size + i, kind)
            store(out, at + i, gate / (_ONE + exp(-gate)) * up, kind)


@jit(parallel=True)
def _rows_parallel(chunks: Any, rows: Any, gate_up: Any, out: Any, size: Any, kind: Any) -> None:
    for c in prange(chunks):
        _rows(rows * c // chunks, rows * (c + 1) // chunks, gate_up, out, size, kind)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [T, 2 * size], contiguous, gate first. Returns [T, size]."""
    assert gate_up.is_contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, size, dtype=gate_up.dtype)
    arguments = (rows, gate_up.data_ptr(), out.data_ptr(), size, KINDS[gate_up.dtype])
    chunks = num_chunks(16 * rows * size)
    if chunks == 1:
        _rows(0, *arguments)
    else:
        _rows_parallel(chunks, *arguments)
    return out
