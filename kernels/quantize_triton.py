"""Rows to fp8 on a GPU, where no kernel before could do it: what attention gives, for the product that follows."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from manta.kernels.fp8 import Fp8Rows
from manta.kernels.fp8_triton import store_fp8


@triton.jit
def _quantize_kernel(
    x, values, scales, scale, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, IS_DYNAMIC: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    value = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    store_fp8(values + row * SIZE + column, scales + row, value, scale, inside, IS_DYNAMIC)


def quantize(x: Tensor, scale: Tensor | None = None) -> Fp8Rows:
    """As `fp8.quantize`: x [T, size], rows contiguous; scale: float32 [1] for all rows; None: each row's own."""
    assert x.stride(1) == 1
    num_rows, size = x.shape
    values = torch.empty(num_rows, size, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_rows, 1, dtype=torch.float32, device=x.device)
    if num_rows:
        block = triton.next_power_of_2(size)
        _quantize_kernel[(num_rows,)](
            x, values.view(torch.uint8), scales, scales if scale is None else scale, x.stride(0),
            SIZE=size, BLOCK=block, IS_DYNAMIC=scale is None, num_warps=min(max(block // 512, 1), 16),
        )  # fmt: skip
    return Fp8Rows(values, scales)
