"""The gated activation of MLPs on a GPU: silu(gate) * up (Shazeer, "GLU variants improve Transformer", 2020), in
float32, rounded once: to the input's dtype, or quantised to fp8 with its scales."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from manta.kernels.fp8 import Fp8Rows
from manta.kernels.fp8_triton import store_fp8

BLOCK = 1024


@triton.jit
def _silu_mul_kernel(
    gate_up, out, scales, scale, stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, IS_FP8: tl.constexpr, IS_DYNAMIC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + SIZE + column, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    to = out + row * SIZE + column
    if IS_FP8:  # programs of one row that share a scale all store it
        store_fp8(to, scales + row, y, scale, inside, IS_DYNAMIC)
    else:
        tl.store(to, y.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 * size], gate first -> silu(gate) * up [T, size] of the same dtype. Rows must be contiguous."""
    out = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2, dtype=gate_up.dtype, device=gate_up.device)
    _launch(gate_up, out, None, None, BLOCK, 4)
    return out


def silu_mul_fp8(gate_up: Tensor, scale: Tensor | None = None) -> Fp8Rows:
    """`silu_mul`, quantised by scale (float32 [1]) or, without one, by each row's own: a program then takes a row."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    values = torch.empty(num_rows, size, dtype=torch.float8_e4m3fn, device=gate_up.device)
    scales = torch.empty(num_rows, 1, dtype=torch.float32, device=gate_up.device)
    block = BLOCK if scale is not None else triton.next_power_of_2(size)
    num_warps = 4 if scale is not None else min(max(block // 512, 1), 32)
    _launch(gate_up, values.view(torch.uint8), scales, scale, block, num_warps)
    return Fp8Rows(values, scales)


def _launch(
    gate_up: Tensor, out: Tensor, scales: Tensor | None, scale: Tensor | None, block: int, num_warps: int
) -> None:
    assert gate_up.stride(1) == 1
    num_rows, size = out.shape
    if not num_rows:
        return
    _silu_mul_kernel[num_rows, triton.cdiv(size, block)](
        gate_up, out, gate_up if scales is None else scales, gate_up if scale is None else scale, gate_up.stride(0),
        SIZE=size, BLOCK=block, IS_FP8=scales is not None, IS_DYNAMIC=scale is None, num_warps=num_warps,
    )  # fmt: skip
