"""Root mean square normalisation on a GPU (Zhang and Sennrich 2019), alone or after adding the residual.

y = x / sqrt(mean(x ** 2) + eps) * weight, in float32, rounded once: to x's dtype, or quantised to fp8 with its scales.
One program per row, the row in registers, so that a row's result does not depend on the others.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from manta.kernels.fp8 import Fp8Rows
from manta.kernels.fp8_triton import store_fp8


@triton.jit
def _norm_kernel(
    x, residual, weight, out, scales, scale, x_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, IS_FP8: tl.constexpr, IS_DYNAMIC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        at = residual + row * SIZE + column
        value += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(residual.dtype.element_ty)
        tl.store(at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value) / SIZE + eps)
    y = value * factor * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    to = out + row * SIZE + column
    if IS_FP8:
        store_fp8(to, scales + row, y, scale, inside, IS_DYNAMIC)
    else:
        tl.store(to, y.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., size], weight: [size] -> [..., size]. Rows must be contiguous and, but for [T, size], without gaps."""
    rows = x if x.dim() == 2 else x.view(-1, x.shape[-1])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(rows, None, weight, eps, out)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x in place, then the norm of it; x, residual: [T, size], the latter contiguous."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, residual, weight, eps, out)
    return out


def rms_norm_fp8(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None) -> Fp8Rows:
    """`rms_norm` of x [T, size], quantised by scale (float32 [1]) or, without one, by each row's own."""
    return _launch_fp8(x, None, weight, eps, scale)


def add_rms_norm_fp8(x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None) -> Fp8Rows:
    """`add_rms_norm`, quantised likewise."""
    return _launch_fp8(x, residual, weight, eps, scale)


def _launch_fp8(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, scale: Tensor | None) -> Fp8Rows:
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    _launch(x, residual, weight, eps, values.view(torch.uint8), scales, scale)
    return Fp8Rows(values, scales)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor,
    scales: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    num_rows, size = x.shape
    assert x.stride(1) == 1
    assert weight.shape == (size,)
    assert residual is None or (residual.shape == x.shape and residual.is_contiguous())
    if not num_rows:
        return
    block = triton.next_power_of_2(size)
    _norm_kernel[(num_rows,)](
        x, x if residual is None else residual, weight, out, weight if scales is None else scales,
        weight if scale is None else scale, x.stride(0), eps,
        SIZE=size, BLOCK=block, HAS_RESIDUAL=residual is not None, IS_FP8=scales is not None, IS_DYNAMIC=scale is None,
        num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip
