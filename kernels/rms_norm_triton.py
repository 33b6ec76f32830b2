"""Root mean square normalisation on a GPU (Zhang and Sennrich 2019), alone or after adding the residual.

y = x / sqrt(mean(x ** 2) + eps) * weight, in float32, rounded once. One program per row, the row in registers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from manta.kernels.fp8_triton import store_rounded


@triton.jit
def _norm_kernel(
    x, residual, weight, out, out_scale, x_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, IS_FP8: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
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
    scale = tl.rsqrt(tl.sum(value * value) / SIZE + eps)
    y = value * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    store_rounded(out + row * SIZE + column, y, tl.load(out_scale) if IS_FP8 else 1.0, inside, IS_FP8)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out_scale: Tensor | None = None) -> Tensor:
    """x: [..., size], weight: [size] -> [..., size] of x's dtype, or float8_e4m3fn of y / out_scale (float32 [1]).

    Rows of x must be contiguous and, but for [T, size], lie without gaps.
    """
    return _launch(x, None, weight, eps, out_scale)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out_scale: Tensor | None = None) -> Tensor:
    """residual += x in place, then the norm of it; x, residual: [T, size], the latter contiguous. Output as above."""
    assert residual.shape == x.shape
    assert residual.is_contiguous()
    return _launch(x, residual, weight, eps, out_scale)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out_scale: Tensor | None) -> Tensor:
    size = x.shape[-1]
    rows = x if x.dim() == 2 else x.view(-1, size)
    assert rows.stride(1) == 1
    assert weight.shape == (size,)
    out = torch.empty(x.shape, dtype=x.dtype if out_scale is None else torch.float8_e4m3fn, device=x.device)
    if not rows.shape[0]:
        return out
    block = triton.next_power_of_2(size)
    _norm_kernel[(rows.shape[0],)](
        rows, rows if residual is None else residual, weight, out if out_scale is None else out.view(torch.uint8),
        weight if out_scale is None else out_scale, rows.stride(0), eps,
        SIZE=size, BLOCK=block, IS_FP8=out_scale is not None, HAS_RESIDUAL=residual is not None,
        num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip
    return out
