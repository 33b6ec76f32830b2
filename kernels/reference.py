"""What every kernel computes, in plain torch: the oracle of the tests. Works on any device; not made to be fast.

Everything is computed in float32 and rounded once, to the input's dtype.
"""

import torch
from torch import Tensor

from manta.kernels.fp8 import Fp8Rows, quantize, to_e4m3
from manta.kernels.metadata import AttentionMetadata


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps) * weight.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., size], weight: [size]. Returns x / sqrt(mean(x ** 2) + eps) * weight."""
    return _normed(x, weight, eps).to(x.dtype)


def rms_norm_fp8(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None) -> Fp8Rows:
    """The same of x [T, size], quantised by scale (float32 [1]) or row by row."""
    return quantize(_normed(x, weight, eps), scale)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x in place; returns the norm of it, as `rms_norm` does. x, residual: [T, hidden]."""
    residual.copy_(x.float() + residual.float())
    return rms_norm(residual, weight, eps)


def add_rms_norm_fp8(x: Tensor, residual: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None) -> Fp8Rows:
    """The same, quantised as `rms_norm_fp8` does."""
    residual.copy_(x.float() + residual.float())
    return rms_norm_fp8(residual, weight, eps, scale)


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2 * size], gate first -> silu(gate) * up [T, size]."""
    return _gated(gate_up).to(gate_up.dtype)


def silu_mul_fp8(gate_up: Tensor, scale: Tensor | None = None) -> Fp8Rows:
    """The same, quantised by scale (float32 [1]) or row by row."""
    return quantize(_gated(gate_up), scale)


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
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Norms (where weights [head_dim] are given) and rotates queries and keys; writes keys and values to the pages.

    qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim], its query part overwritten by the rotated queries; the key
    part is left undefined. cos_sin: float32 [T, head_dim]; the others as in `kv_write`. Pages of float8_e4m3fn hold
    keys / k_scale and values / v_scale (float32 [1]). On a GPU a slot below 0 stands for a token that is not there.
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
    k = apply_rope(k, cos_sin)
    if k_scale is not None and v_scale is not None:
        # Bytes: torch has no indexed write of fp8.
        k, v = (to_e4m3(x, scale).view(torch.uint8) for x, scale in ((k, k_scale), (v, v_scale)))
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    kv_write(k, v, slot_mapping, keys, values)


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Causal attention of q [T, num_heads * head_dim] over each row's pages; returns the same shape.

    The query at position p sees positions max(0, p - window + 1) : p + 1. Query head h uses KV head
    h // (num_heads / num_kv_heads). k_scale, v_scale: what keys and values are multiplied by, float32 [1].
    """
    num_kv_heads, block_size, dim = keys.shape[1:]
    out = torch.empty_like(q)
    for row in range(metadata.num_rows):
        start, end = metadata.query_start[row : row + 2].tolist()
        length = int(metadata.seq_lens[row])
        blocks = metadata.block_tables[row, : -(-length // block_size)].long()
        k = keys[blocks].transpose(1, 2).reshape(-1, num_kv_heads, dim)[:length].float()
        v = values[blocks].transpose(1, 2).reshape(-1, num_kv_heads, dim)[:length].float()
        if k_scale is not None and v_scale is not None:
            k, v = k * k_scale, v * v_scale
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


def logprobs(logits: Tensor, tokens: Tensor, num_best: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The log-probabilities float32 [N] and ranks int64 [N] of tokens (int64 [N]), then ids (int64) and
    log-probabilities (float32) of the num_best most probable tokens [N, num_best], descending; equal ones by their ids.

    logits: float32 [N, vocab]. A rank is one more than the number of tokens that are more probable."""
    values = logits.log_softmax(dim=-1)
    ranks = (logits > logits.gather(1, tokens[:, None])).sum(dim=-1) + 1
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :num_best]
    return values.gather(1, tokens[:, None])[:, 0], ranks, ids, values.gather(1, ids)
