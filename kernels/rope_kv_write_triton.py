"""Rotary embedding (Su et al. 2021) of queries and keys and the write of keys and values to their pages, as one GPU
kernel; with weights, queries and keys are normed first (RMS norm over each head).

A program takes some heads of one token. Head by head it is a query, a key or a value: values pass with cosine 1, sine 0
and no norm, so that all take one path.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from manta.kernels.fp8_triton import store_rounded

TILE = 1024  # values of each half of the heads of a program


@triton.jit
def _norm_weights(
    q_norm,
    k_norm,
    is_query,
    is_key,
    at,
    inside,
    HAS_Q: tl.constexpr,
    HAS_K: tl.constexpr,
):
    """float32 [HEADS, HALF]: the weights of each head's norm, 1 for heads without."""
    q = tl.load(q_norm + at, mask=inside, other=0.0).to(tl.float32)[None, :] if HAS_Q else 1.0
    k = tl.load(k_norm + at, mask=inside, other=0.0).to(tl.float32)[None, :] if HAS_K else 1.0
    return tl.where(is_query[:, None], q, tl.where(is_key[:, None], k, 1.0))


@triton.jit
def _rope_kv_kernel(
    qkv, cos_sin, slot_mapping, keys, values, q_norm, k_norm,
    k_scale, v_scale, qkv_stride, block_stride, head_stride, offset_stride, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, HAS_Q_NORM: tl.constexpr, HAS_K_NORM: tl.constexpr, IS_FP8: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    is_query = head < NUM_HEADS
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    is_key = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    has_pair = pair < DIM // 2
    inside = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & has_pair[None, :]

    at = qkv + token * qkv_stride + head[:, None] * DIM + pair[None, :]
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + DIM // 2, mask=inside, other=0.0).to(tl.float32)
    if HAS_Q_NORM or HAS_K_NORM:
        normed = (is_query & HAS_Q_NORM) | (is_key & HAS_K_NORM)
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / DIM + eps)
        scale = tl.where(normed, scale, 1.0)[:, None]
        a *= scale * _norm_weights(q_norm, k_norm, is_query, is_key, pair, has_pair, HAS_Q_NORM, HAS_K_NORM)
        b *= scale * _norm_weights(q_norm, k_norm, is_query, is_key, pair + DIM // 2, has_pair, HAS_Q_NORM, HAS_K_NORM)
    cos = tl.load(cos_sin + token * DIM + pair, mask=has_pair, other=0.0)[None, :]
    sin = tl.load(cos_sin + token * DIM + DIM // 2 + pair, mask=has_pair, other=0.0)[None, :]
    cos = tl.where(is_value[:, None], 1.0, cos)
    sin = tl.where(is_value[:, None], 0.0, sin)
    first, second = a * cos - b * sin, b * cos + a * sin

    queries = inside & is_query[:, None]
    tl.store(at, first.to(qkv.dtype.element_ty), mask=queries)
    tl.store(at + DIM // 2, second.to(qkv.dtype.element_ty), mask=queries)
    slot = tl.load(slot_mapping + token)
    page = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * offset_stride
    own = inside & (slot >= 0)
    key = own & is_key[:, None]
    to = keys + page + (head - NUM_HEADS)[:, None] * head_stride + pair[None, :]
    scale_of_keys = tl.load(k_scale) if IS_FP8 else 1.0
    store_rounded(to, first, scale_of_keys, key, IS_FP8)
    store_rounded(to + DIM // 2, second, scale_of_keys, key, IS_FP8)
    value = own & is_value[:, None]
    to = values + page + (head - NUM_HEADS - NUM_KV_HEADS)[:, None] * head_stride + pair[None, :]
    scale_of_values = tl.load(v_scale) if IS_FP8 else 1.0
    store_rounded(to, first, scale_of_values, value, IS_FP8)
    store_rounded(to + DIM // 2, second, scale_of_values, value, IS_FP8)


def rope_kv_write(
    qkv: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor,
    keys: Tensor,
    values: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """As `reference.rope_kv_write`: qkv [T, (num_heads + 2 * num_kv_heads) * head_dim], rows contiguous; cos_sin
    float32 [T, head_dim]; slot_mapping int64 [T], below 0 where nothing is written; keys, values [num_blocks,
    num_kv_heads, block_size, head_dim] of equal strides, of any float dtype. Pages of float8_e4m3fn hold the value
    divided by k_scale or v_scale (float32 [1])."""
    assert qkv.stride(1) == 1
    assert cos_sin.is_contiguous()
    assert cos_sin.dtype == torch.float32
    assert keys.stride() == values.stride()
    assert keys.stride(3) == 1
    _, num_kv_heads, block_size, dim = keys.shape
    num_tokens, num_all_heads = qkv.shape[0], qkv.shape[1] // dim
    is_fp8 = keys.dtype == torch.float8_e4m3fn
    assert is_fp8 == (k_scale is not None) == (v_scale is not None), "pages of fp8, and only those, have scales"
    if not num_tokens:
        return
    half = triton.next_power_of_2(dim // 2)
    heads = min(triton.next_power_of_2(num_all_heads), max(TILE // half, 1))
    if is_fp8:
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    _rope_kv_kernel[num_tokens, triton.cdiv(num_all_heads, heads)](
        qkv, cos_sin, slot_mapping, keys, values, qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm,
        k_scale, v_scale, qkv.stride(0), keys.stride(0), keys.stride(1), keys.stride(2), eps,
        NUM_HEADS=num_all_heads - 2 * num_kv_heads, NUM_KV_HEADS=num_kv_heads, DIM=dim, BLOCK_SIZE=block_size,
        HEADS=heads, HALF=half, HAS_Q_NORM=q_norm is not None, HAS_K_NORM=k_norm is not None, IS_FP8=is_fp8,
        num_warps=min(max(heads * half // 256, 1), 8),
    )  # fmt: skip
