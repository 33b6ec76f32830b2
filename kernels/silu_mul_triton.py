"""The gated activation of MLPs on a GPU: silu(gate) * up (Shazeer, "GLU variants improve Transformer", 2020)."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from manta.kernels.fp8_triton import store_rounded

BLOCK = 1024


@triton.jit
def _silu_mul_kernel(
    gate_up,
    out,
    out_scale,
    stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + SIZE + column, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    store_rounded(out + row * SIZE + column, y, tl.load(out_scale) if IS_FP8 else 1.0, inside, IS_FP8)


def silu_mul(gate_up: Tensor, out_scale: Tensor | None = None) -> Tensor:
    """[T, 2 * size], gate first -> silu(gate) * up [T, size] of the same dtype; with out_scale (float32 [1]) it is
    divided by that and of float8_e4m3fn. Rows must be contiguous."""
    assert gate_up.stride(1) == 1
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    dtype = gate_up.dtype if out_scale is None else torch.float8_e4m3fn
    out = torch.empty(num_rows, size, dtype=dtype, device=gate_up.device)
    if not num_rows:
        return out
    _silu_mul_kernel[num_rows, triton.cdiv(size, BLOCK)](
        gate_up, out if out_scale is None else out.view(torch.uint8), gate_up if out_scale is None else out_scale,
        gate_up.stride(0), SIZE=size, BLOCK=BLOCK, IS_FP8=out_scale is not None, num_warps=4,
    )  # fmt: skip
    return out
