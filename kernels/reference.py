"""What every kernel computes, in plain torch: the oracle of the tests. Works on any device; not made to be fast.

Everything is computed in float32 and rounded once, to the input's dtype.
"""

import torch
from torch import Tensor

from manta.kernels.metadata import AttentionMetadata


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., size], weight: [size]. Returns x / sqrt(mean(x ** 2) + eps) * weight."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x in place; returns the norm of it. x, residual: [T, hidden]."""
    residual.copy_(x.float() + residual.float())
    return rms_norm(residual, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 * size], gate first -> silu(gate) * up [T, size]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def apply_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates heads x [T, num_heads, head_dim] by cos_sin: float32 [T, head_dim], cosines first."""
    cos, sin = cos_sin[:, None, :].chunk(2, dim=-1)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def kv_write(k: Tensor, v: Tensor, slot_mapping: Tensor, keys: Tensor, values: Tensor) -> None:
    """Writes k, v [T, num_kv_heads, head_dim] to the slots int64 [T] of the pages.

    keys, values: [num_blocks, num_kv_heads, block_size, head_dim]; slot s is offset s % block_size of block
    s // block_size.
    """
    block_size = keys.shape[2]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    keys[blocks, :, offsets] = k.to(keys.dtype)
    values[blocks, :, offsets] = v.to(values.dtype)


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
    """Norms (where weights [head_dim] are given) and rotates queries and keys; writes keys and values to the pages.

    qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], its query part overwritten by the rotated queries; the key
    part is left undefined. cos_sin: float32 [T, head_dim]; the others as in `kv_write`.
    """
    num_kv_heads, dim = keys.shape[1], keys.shape[3]
    heads = qkv.view(qkv.shape[0], -1, dim).float()
    num_heads = heads.shape[1] - 2 * num_kv_heads
    q, k, v = heads.tensor_split((num_heads, num_heads + num_kv_heads), dim=1)
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps)
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps)
    q = apply_rope(q, cos_sin)
    qkv[:, : q.shape[1] * dim] = q.flatten(1).to(qkv.dtype)
    kv_write(apply_rope(k, cos_sin), v, slot_mapping, keys, values)


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention of q [T, num_heads * head_dim] over each row's pages; returns the same shape.

    The query at position p sees positions max(0, p - window + 1) : p + 1. Query head h uses KV head
    h // (num_heads / num_kv_heads).
    """
    num_kv_heads, block_size, dim = keys.shape[1:]
    out = torch.empty_like(q)
    for row in range(metadata.num_rows):
        start, end = metadata.query_start[row : row + 2].tolist()
        length = int(metadata.seq_lens[row])
        blocks = metadata.block_tables[row, : -(-length // block_size)].long()
        k = keys[blocks].transpose(1, 2).reshape(-1, num_kv_heads, dim)[:length].float()
        v = values[blocks].transpose(1, 2).reshape(-1, num_kv_heads, dim)[:length].float()
        heads = q[start:end].view(end - start, num_kv_heads, -1, dim).float()
        scores = torch.einsum("qhgd,khd->hgqk", heads, k) * scale
        query_positions = torch.arange(length - (end - start), length, device=q.device)[:, None]
        key_positions = torch.arange(length, device=q.device)[None, :]
        seen = key_positions <= query_positions
        if window is not None:
            seen &= key_positions > query_positions - window
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        out[start:end] = torch.einsum("hgqk,khd->qhgd", weights, v).reshape(end - start, -1).to(q.dtype)
    return out
