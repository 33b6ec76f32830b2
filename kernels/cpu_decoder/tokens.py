"""What a step does token by token: the residual stream, norms, rotation of queries and keys, writes to the pages.

Activations are float32; only weights, pages and what enters or leaves the stage have the model's dtype.
"""

import math
from typing import Any

import numpy as np

from manta.kernels.cpu_decoder.tiles import LANES
from manta.kernels.cpu_scalars import is_paired, item_bytes, jit, load, load_int64, store

_F32 = np.float32(0)
_ZERO = np.float32(0)


def convert(
    begin: Any, end: Any, x: Any, x_stride: Any, out: Any, out_stride: Any, size: Any, kind: Any, to: Any
) -> None:
    """Rows begin : end of out, of kind `to`, = x, of kind `kind`, with one rounding."""
    for row in range(begin, end):
        for i in range(size):
            store(out, row * out_stride + i, load(x, row * x_stride + i, kind), to)


def add(begin: Any, end: Any, residual: Any, partial: Any, size: Any) -> None:
    """residual += partial, both float32 [T, size], tokens begin : end."""
    for i in range(begin * size, end * size):
        store(residual, i, load(residual, i, _F32) + load(partial, i, _F32), _F32)


def norm(
    begin: Any, end: Any, residual: Any, weight: Any, size: Any, out: Any, out_stride: Any, eps: Any, kind: Any
) -> None:
    """out = the root mean square norm of residual float32 [T, size], times weight float32 [size], in dtype `kind`."""
    for token in range(begin, end):
        at = token * size
        squares = _ZERO
        for i in range(size):
            value = load(residual, at + i, _F32)
            squares += value * value
        scale = np.float32(1.0 / math.sqrt(squares / size + eps))
        for i in range(size):
            value = load(residual, at + i, _F32) * scale * load(weight, i, _F32)
            store(out, token * out_stride + i, value, kind)


@jit()
def _rotate(x: Any, x_at: Any, cos_sin: Any, cos_at: Any, half: Any, norm: Any, eps: Any) -> None:
    """One head of one token in place: norm (weight at `norm`, or 0), then rotary embedding, halves paired."""
    scale = np.float32(1)
    if norm != 0:
        squares = _ZERO
        for i in range(2 * half):
            value = load(x, x_at + i, _F32)
            squares += value * value
        scale = np.float32(1.0 / math.sqrt(squares / (2 * half) + eps))
        for i in range(2 * half):
            store(x, x_at + i, load(x, x_at + i, _F32) * scale * load(norm, i, _F32), _F32)
    for i in range(half):
        a, b = load(x, x_at + i, _F32), load(x, x_at + half + i, _F32)
        cos, sin = load(cos_sin, cos_at + i, _F32), load(cos_sin, cos_at + half + i, _F32)
        store(x, x_at + i, a * cos - b * sin, _F32)
        store(x, x_at + half + i, b * cos + a * sin, _F32)


@jit()
def _write_key(x: Any, x_at: Any, page: Any, offset: Any, dim: Any, dims: Any, kind: Any) -> None:
    """Token `offset` of a page of keys: see `layout`."""
    panel = offset // LANES * LANES * dims + offset % LANES * (2 if is_paired(kind) else 1)
    if is_paired(kind):
        for d in range(dim // 2):
            store(page, panel + d * 2 * LANES, load(x, x_at + 2 * d, _F32), kind)
            store(page, panel + d * 2 * LANES + 1, load(x, x_at + 2 * d + 1, _F32), kind)
    else:
        for d in range(dim):
            store(page, panel + d * LANES, load(x, x_at + d, _F32), kind)


@jit()
def _write_value(x: Any, x_at: Any, page: Any, offset: Any, dim: Any, dims: Any, is_last: Any, kind: Any) -> None:
    """Token `offset` of a page of values.

    Tiles read two tokens at a time, the second at weight 0 while it is not a token of the sequence. What an earlier
    owner of the page left there may be infinite, and infinity times 0 is no number: hence zeros.
    """
    at, step, neighbour = offset * dims, 1, dims
    if is_paired(kind):
        at, step, neighbour = offset // 2 * 2 * dims + offset % 2, 2, 1
    for d in range(dim):
        store(page, at + step * d, load(x, x_at + d, _F32), kind)
    if offset % 2 == 0 and is_last:
        for d in range(dim):
            store(page, at + step * d + neighbour, _ZERO, kind)


def rope_kv_write(
    begin: Any, end: Any, tokens: Any, qkv: Any, qkv_stride: Any, rope_table: Any, positions: Any, slot_mapping: Any,
    keys: Any, values: Any, num_heads: Any, num_kv_heads: Any, dim: Any, block_size: Any, page_tokens: Any,
    page_dims: Any, q_norm: Any, k_norm: Any, eps: Any, kind: Any,
) -> None:  # fmt: skip
    """Tokens begin : end of qkv float32 [tokens, (num_heads + 2 * num_kv_heads) * dim]: norms (weights at q_norm and
    k_norm, or 0) and rotates queries and keys in place, writes keys and values to the slots of the pages.

    rope_table: float32 [max_position, dim], cosines first (Su et al. 2021, "RoFormer"; halves paired as Llama's
    checkpoints have them). positions, slot_mapping: int64 [tokens].
    """
    half = dim // 2
    page_bytes = page_tokens * page_dims * item_bytes(kind)
    for token in range(begin, end):
        at = token * qkv_stride
        cos_at = load_int64(positions, token) * dim
        for head in range(num_heads):
            _rotate(qkv, at + head * dim, rope_table, cos_at, half, q_norm, eps)
        slot = load_int64(slot_mapping, token)
        is_last = token + 1 == tokens or load_int64(slot_mapping, token + 1) != slot + 1
        offset = slot % block_size
        for head in range(num_kv_heads):
            page = (slot // block_size * num_kv_heads + head) * page_bytes
            k_at = at + (num_heads + head) * dim
            _rotate(qkv, k_at, rope_table, cos_at, half, k_norm, eps)
            _write_key(qkv, k_at, keys + page, offset, dim, page_dims, kind)
            _write_value(qkv, k_at + num_kv_heads * dim, values + page, offset, dim, page_dims, is_last, kind)
