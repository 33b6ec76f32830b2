"""What happens between the QKV projection and attention, in one pass over the tokens on the CPU.

Per query and key head: root mean square norm where the model has one (Qwen3), then the rotation of rotary position
embedding (Su et al. 2021, "RoFormer"), halves paired as Llama's checkpoints have them:

    y[i] = x[i] cos[i] - x[i + half] sin[i],  y[i + half] = x[i + half] cos[i] + x[i] sin[i]

Queries are rotated in place; keys and values go to the page that slot_mapping names.
"""

import math
from typing import Any

import numpy as np
from numba import prange
from torch import Tensor

from manta.kernels.cpu_scalars import KINDS, jit, load, load_int64, num_chunks, store

_F32 = np.float32(0)
_ZERO = np.float32(0)


@jit(forceinline=True)
def _rotate(
    x: Any, x_at: Any, out: Any, out_at: Any, cos_sin: Any, cos_at: Any, half: Any, norm: Any, eps: Any, kind: Any
) -> None:
    """One head of one token; `norm` is the address of the norm's weight, or 0."""
    if norm == 0:
        for i in range(half):
            a, b = load(x, x_at + i, kind), load(x, x_at + half + i, kind)
            cos, sin = load(cos_sin, cos_at + i, _F32), load(cos_sin, cos_at + half + i, _F32)
            store(out, out_at + i, a * cos - b * sin, kind)
            store(out, out_at + half + i, b * cos + a * sin, kind)
        return
    squares = _ZERO
    for i in range(2 * half):
        value = load(x, x_at + i, kind)
        squares += value * value
    scale = np.float32(1.0 / math.sqrt(squares / (2 * half) + eps))
    for i in range(half):
        a = load(x, x_at + i, kind) * scale * load(norm, i, kind)
        b = load(x, x_at + half + i, kind) * scale * load(norm, half + i, kind)
        cos, sin = load(cos_sin, cos_at + i, _F32), load(cos_sin, cos_at + half + i, _F32)
        store(out, out_at + i, a * cos - b * sin, kind)
        store(out, out_at + half + i, b * cos + a * sin, kind)


@jit()
def _tokens(
    begin: Any, end: Any, qkv: Any, cos_sin: Any, slot_mapping: Any, keys: Any, values: Any, num_heads: Any,
    num_kv_heads: Any, dim: Any, block_size: Any, q_norm: Any, k_norm: Any, eps: Any, kind: Any,
) -> None:  # fmt: skip
    half = dim // 2
    width = (num_heads + 2 * num_kv_heads) * dim
    for token in range(begin, end):
        at = token * width
        for head in range(num_heads):
            q_at = at + head * dim
            _rotate(qkv, q_at, qkv, q_at, cos_sin, token * dim, half, q_norm, eps, kind)
        slot = load_int64(slot_mapping, token)
        for head in range(num_kv_heads):
            page = slot // block_size * num_kv_heads + head
            slot_at = (page * block_size + slot % block_size) * dim
            k_at = at + (num_heads + head) * dim
            _rotate(qkv, k_at, keys, slot_at, cos_sin, token * dim, half, k_norm, eps, kind)
            v_at = k_at + num_kv_heads * dim
            for i in range(dim):
                store(values, slot_at + i, load(qkv, v_at + i, kind), kind)


@jit(parallel=True)
def _tokens_parallel(
    chunks: Any, tokens: Any, qkv: Any, cos_sin: Any, slot_mapping: Any, keys: Any, values: Any, num_heads: Any,
    num_kv_heads: Any, dim: Any, block_size: Any, q_norm: Any, k_norm: Any, eps: Any, kind: Any,
) -> None:  # fmt: skip
    for c in prange(chunks):
        _tokens(
            tokens * c // chunks, tokens * (c + 1) // chunks, qkv, cos_sin, slot_mapping, keys, values, num_heads,
            num_kv_heads, dim, block_size, q_norm, k_norm, eps, kind,
        )  # fmt: skip


def rope_kv_write(
    qkv: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor,
    keys: Tensor,
    values: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Same contract as reference.rope_kv_write.

    qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], contiguous; its query part is overwritten. cos_sin: float32
    [T, head_dim]. slot_mapping: int64 [T], each slot at most once. keys, values: [num_blocks, num_kv_heads,
    block_size, head_dim], contiguous. q_norm, k_norm: [head_dim].
    """
    _, num_kv_heads, block_size, dim = keys.shape
    num_tokens, width = qkv.shape
    assert qkv.is_contiguous()
    assert cos_sin.is_contiguous()
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert qkv.dtype == keys.dtype == values.dtype
    arguments = (
        num_tokens, qkv.data_ptr(), cos_sin.data_ptr(), slot_mapping.data_ptr(), keys.data_ptr(), values.data_ptr(),
        width // dim - 2 * num_kv_heads, num_kv_heads, dim, block_size, 0 if q_norm is None else q_norm.data_ptr(),
        0 if k_norm is None else k_norm.data_ptr(), eps, KINDS[qkv.dtype],
    )  # fmt: skip
    chunks = num_chunks(4 * num_tokens * width)
    if chunks == 1:
        _tokens(0, *arguments)
    else:
        _tokens_parallel(chunks, *arguments)
