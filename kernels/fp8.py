"""float8 e4m3 in plain torch: rounding, scales of rows, products. Quantises weights, and is the oracle of GPU kernels.

A matrix x [n, size] is kept as values and a scale for each row, x = values * scales (Micikevicius et al., "FP8 formats
for deep learning", 2022). The scale of a row that is quantised as it comes is its largest magnitude / 448.
"""

from typing import NamedTuple

import torch
from torch import Tensor

E4M3_MAX = 448.0


class Fp8Rows(NamedTuple):
    """values: float8_e4m3fn [T, size]; scales: float32 [T, 1], what they are multiplied by."""

    values: Tensor
    scales: Tensor


def to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale (float32 [1] or [T, 1]) as float8_e4m3fn, to nearest; what is beyond 448 becomes 448."""
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize(x: Tensor, scale: Tensor | None = None) -> Fp8Rows:
    """x [T, size] of any float dtype; scale: float32 [1] for all rows; None: each row's own."""
    if scale is None:
        most = x.float().abs().amax(dim=-1, keepdim=True)
        scales = torch.where(most > 0, most * (1.0 / E4M3_MAX), 1.0)
    else:
        scales = scale.expand(x.shape[0], 1).contiguous()
    return Fp8Rows(to_e4m3(x, scales), scales)


def dequantize(rows: Fp8Rows, dtype: torch.dtype) -> Tensor:
    """[T, size] of dtype."""
    return (rows.values.float() * rows.scales).to(dtype)


def scaled_linear(x: Fp8Rows, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [T, in] @ weight.T + bias, in float32, rounded once -> [T, out] of dtype.

    weight: float8_e4m3fn [out, in]; weight_scales: float32 [out]; bias: [out].
    """
    out = x.values.float() @ weight.float().T * (x.scales * weight_scales)
    return (out if bias is None else out + bias.float()).to(dtype)
