"""Products of linear layers on a GPU whose rows do not depend on each other, not even on how many there are.

Libraries pick a kernel, and with it an order of additions, by the number of rows. Here tiles and splits of the inner
dimension follow from the weight's shape alone ("Defeating nondeterminism in LLM inference", He et al. 2025): the inner
dimension is cut into `num_splits` parts, each summed by the same matrix instructions, and the parts are added in order.
Few rows: a program per part, and a second launch adds them. Many rows: one program takes all parts of its tile in turn.
Both do the same operations, so which one runs, which does depend on the number of rows, changes no bit.

Operands are of one 16-bit type, float32, or fp8 with scales of rows and of output channels, applied to the sum.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from manta.kernels.fp8 import Fp8Rows
from manta.kernels.gpu import gpu_of

NUM_PROGRAMS = 256  # that splitting aims at for few rows; a constant, so that every device adds alike
MIN_SPLIT_TILES = 4  # inner tiles of a part
GROUP_M = 8  # row tiles that share the weight's tiles in the cache
MERGE_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tiles of block_m rows x block_n outputs x block_k inner; parts of `split` inner elements."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split: int
    num_splits: int


@lru_cache(maxsize=1024)
def tiling(num_out: int, num_in: int, element_bytes: int) -> Tiling:
    """Follows from the weight [num_out, num_in] alone."""
    tiles_of = {1: (64, 128, 128, 4), 2: (64, 128, 64, 4), 4: (32, 64, 32, 2)}
    block_m, block_n, block_k, num_stages = tiles_of[element_bytes]
    k_tiles = triton.cdiv(num_in, block_k)
    wanted = triton.cdiv(NUM_PROGRAMS, triton.cdiv(num_out, block_n))
    tiles = triton.cdiv(k_tiles, max(1, min(wanted, k_tiles // MIN_SPLIT_TILES)))
    return Tiling(block_m, block_n, block_k, 4, num_stages, tiles * block_k, triton.cdiv(k_tiles, tiles))


@triton.jit
def _finish(total, row_scale, channel_scale, bias, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The sum in its scales, plus the bias: in both kernels the same operations."""
    if HAS_SCALES:
        total = total * (row_scale * channel_scale)
    if HAS_BIAS:
        total = total + bias
    return total


@triton.jit
def _part(
    x_rows, weight_rows, begin, K: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, IMPRECISE: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_M, BLOCK_N]: the product over inner elements begin : begin + SPLIT."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(begin, min(begin + SPLIT, K), BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        if K % BLOCK_K == 0:
            x = tl.load(x_rows + at[None, :])
            weight = tl.load(weight_rows + at[None, :])
        else:
            x = tl.load(x_rows + at[None, :], mask=(at < K)[None, :], other=0.0)
            weight = tl.load(weight_rows + at[None, :], mask=(at < K)[None, :], other=0.0)
        acc = tl.dot(x.to(DOT), tl.trans(weight.to(DOT)), acc, input_precision="ieee", max_num_imprecise_acc=IMPRECISE)
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def _product_kernel(
    x, weight, out, partial, row_scales, channel_scales, bias, num_rows, x_stride,
    N: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, NUM_SPLITS: tl.constexpr, IS_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, DOT: tl.constexpr, IMPRECISE: tl.constexpr,
):  # fmt: skip
    """One tile of outputs; with IS_SPLIT of one part, to `partial` float32 [NUM_SPLITS, num_rows, N]."""
    num_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    group = tl.program_id(0) // (GROUP_M * num_n)
    first_m = group * GROUP_M
    in_group = min((num_rows + BLOCK_M - 1) // BLOCK_M - first_m, GROUP_M)
    place = tl.program_id(0) % (GROUP_M * num_n)
    row = (first_m + place % in_group) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = place // in_group * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and channels that do not exist are read as the last ones and not written.
    x_rows = x + (tl.minimum(row, num_rows - 1).to(tl.int64) * x_stride)[:, None]
    weight_rows = weight + (tl.minimum(channel, N - 1).to(tl.int64) * K)[:, None]
    inside = (row < num_rows)[:, None] & (channel < N)[None, :]
    at = row.to(tl.int64)[:, None] * N + channel[None, :]
    if IS_SPLIT:
        split = tl.program_id(1)
        acc = _part(x_rows, weight_rows, split * SPLIT, K, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K, DOT, IMPRECISE)
        tl.store(partial + split.to(tl.int64) * num_rows * N + at, acc, mask=inside)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for split in range(NUM_SPLITS):
            total += _part(x_rows, weight_rows, split * SPLIT, K, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K, DOT, IMPRECISE)
        row_scale, channel_scale, added = 1.0, 1.0, 0.0
        if HAS_SCALES:
            row_scale = tl.load(row_scales + row, mask=row < num_rows, other=0.0)[:, None]
            channel_scale = tl.load(channel_scales + channel, mask=channel < N, other=0.0)[None, :]
        if HAS_BIAS:
            added = tl.load(bias + channel, mask=channel < N, other=0.0).to(tl.float32)[None, :]
        y = _finish(total, row_scale, channel_scale, added, HAS_SCALES, HAS_BIAS)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _merge_kernel(
    out, partial, row_scales, channel_scales, bias, num_rows,
    N: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Adds the parts of one row in their order."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < N
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        total += tl.load(partial + (split * num_rows + row) * N + channel, mask=inside, other=0.0)
    row_scale, channel_scale, added = 1.0, 1.0, 0.0
    if HAS_SCALES:
        row_scale = tl.load(row_scales + row)
        channel_scale = tl.load(channel_scales + channel, mask=inside, other=0.0)
    if HAS_BIAS:
        added = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    y = _finish(total, row_scale, channel_scale, added, HAS_SCALES, HAS_BIAS)
    tl.store(out + row * N + channel, y.to(out.dtype.element_ty), mask=inside)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in] @ weight.T + bias -> [T, out], of x's dtype: float16, bfloat16 or float32, as weight [out, in] and bias
    [out]. Rows of x must be contiguous; summed in float32, rounded once."""
    return _launch(x, weight, None, None, bias, x.dtype)


def scaled_linear(x: Fp8Rows, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As `fp8.scaled_linear`: weight float8_e4m3fn [out, in], weight_scales float32 [out] -> [T, out] of dtype."""
    return _launch(x.values, weight, x.scales, weight_scales, bias, dtype)


def _launch(
    x: Tensor,
    weight: Tensor,
    row_scales: Tensor | None,
    channel_scales: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    num_rows, (num_out, num_in) = x.shape[0], weight.shape
    assert x.shape[1] == num_in
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    assert x.dtype == weight.dtype
    out = torch.empty(num_rows, num_out, dtype=dtype, device=x.device)
    if not num_rows:
        return out
    plan = tiling(num_out, num_in, x.element_size())
    num_tiles = triton.cdiv(num_rows, plan.block_m) * triton.cdiv(num_out, plan.block_n)
    is_split = plan.num_splits > 1 and num_tiles < gpu_of(x.device).num_sms
    has_scales, has_bias = row_scales is not None, bias is not None
    shape = (plan.num_splits, num_rows, num_out)
    partial = torch.empty(shape, dtype=torch.float32, device=x.device) if is_split else out
    extras = (row_scales if has_scales else out, channel_scales if has_scales else out, bias if has_bias else out)
    _product_kernel[num_tiles, plan.num_splits if is_split else 1](
        x, weight, out, partial, *extras, num_rows, x.stride(0),
        N=num_out, K=num_in, SPLIT=plan.split, NUM_SPLITS=plan.num_splits, IS_SPLIT=is_split,
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, GROUP_M=GROUP_M,
        HAS_SCALES=has_scales, HAS_BIAS=has_bias, DOT=_dot_type(x), IMPRECISE=plan.block_k,
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip
    if is_split:
        _merge_kernel[num_rows, triton.cdiv(num_out, MERGE_BLOCK)](
            out, partial, *extras, num_rows, N=num_out, NUM_SPLITS=plan.num_splits, BLOCK=MERGE_BLOCK,
            HAS_SCALES=has_scales, HAS_BIAS=has_bias, num_warps=4,
        )  # fmt: skip
    return out


def _dot_type(x: Tensor) -> tl.dtype:
    # Triton's interpreter multiplies the bits of bfloat16 and fp8 as integers.
    if x.is_cpu and x.dtype != torch.float16:
        return tl.float32
    return {
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
        torch.float32: tl.float32,
        torch.float8_e4m3fn: tl.float8e4nv,
    }[x.dtype]
