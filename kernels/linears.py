"""The forms of linear layers on GPUs behind one interface. `ops` chooses by device.

fp8 weights are multiplied by torch's `_scaled_mm`, with scales of rows and of output channels; where that cannot
(other outputs than bfloat16, sizes that 16 does not divide) or may not (batch-invariant), by `matmul_triton`.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from manta.kernels import fp8
from manta.kernels.fp8 import Fp8Rows
from manta.kernels.gpu import gpu_of

_SCALED_MM_MULTIPLE = 16


def has_fp8_products(device: torch.device) -> bool:
    """Whether the device multiplies fp8 matrices: GPUs from compute capability 8.9 on."""
    return device.type == "cuda" and find_spec("triton") is not None and gpu_of(device).converts_e4m3


def make_linear(weight: Tensor, bias: Tensor | None, batch_invariant: bool) -> Callable[[Tensor], Tensor]:
    """The function [T, in] -> [T, out] of weight [out, in] and bias [out]."""
    if not batch_invariant:
        return lambda x: F.linear(x, weight, bias)
    from manta.kernels import matmul_triton  # needs triton

    return lambda x: matmul_triton.linear(x, weight, bias)


def make_fp8_linear(
    weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype, batch_invariant: bool
) -> Callable[[Fp8Rows], Tensor]:
    """The function Fp8Rows of [T, in] -> [T, out] of dtype.

    weight: float8_e4m3fn [out, in]; weight_scales: float32 [out]; bias: [out]. A CPU computes it by the reference.
    """
    if weight.is_cpu:
        form = fp8.scaled_linear
    elif batch_invariant or not scaled_mm_takes(weight, dtype):
        from manta.kernels import matmul_triton  # needs triton

        form = matmul_triton.scaled_linear
    else:
        form = scaled_mm
    return partial(form, weight=weight, weight_scales=weight_scales, bias=bias, dtype=dtype)


def scaled_mm_takes(weight: Tensor, dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and all(size % _SCALED_MM_MULTIPLE == 0 for size in weight.shape)


def scaled_mm(x: Fp8Rows, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`fp8.scaled_linear` by torch's product of scaled rows and columns."""
    return torch._scaled_mm(
        x.values, weight.t(), scale_a=x.scales, scale_b=weight_scales[None, :], bias=bias, out_dtype=dtype,
        use_fast_accum=True,
    )  # fmt: skip
