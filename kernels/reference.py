"""What every kernel computes, in plain torch: the oracle of the tests. Works on any device; not made to be fast.

Everything is computed in float32 and rounded once, to the input's dtype.
"""

import torch
from torch import Tensor

from manta.kernels.metadata import AttentionMetadata

E4M3_MAX = 448.0


def to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale (float32 [1]) as float8_e4m3fn, to nearest; what is beyond its greatest value becomes that."""
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _rounded(wide: Tensor, dtype: torch.dtype, out_scale: Tensor | None) -> Tensor:
    return wide.to(dtype) if out_scale is None else to_e4m3(wide, out_scale)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out_scale: Tensor | None = None) -> Tensor:
    """x: [..., size], weight: [size]. Returns x / sqrt(mean(x ** 2) + eps) * weight, of x's dtype or, where a scale
    is given (float32 [1]), divided by that as float8_e4m3fn."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    return _rounded(wide * weight.float(), x.dtype, out_scale)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out_scale: Tensor | None = None) -> Tensor:
    """residual += x in place; returns the norm of it, as `rms_norm` does. x, residual: [T, hidden]."""
    residual.copy_(x.float() + residual.float())
    return rms_norm(residual, weight, eps, out_scale)


def silu_mul(gate_up: Tensor, out_scale: Tensor | None = None) -> Tensor:
    """[T, 2 * size], gate first -> silu(gate) * up [T, size]; out_scale as in `rms_norm`."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return _rounded(torch.nn.functional.silu(gate) * up, gate_up.dtype, out_scale)


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


def logprobs(logits: Tensor, tokens: Tensor, num_best: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The log-probabilities float32 [N] of tokens (int64 [N]), then ids (int64) and log-probabilities (float32) of the
    num_best most probable tokens [N, num_best], descending; equal ones by their ids. logits: float32 [N, vocab]."""
    values = logits.log_softmax(dim=-1)
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :num_best]
    return values.gather(1, tokens[:, None])[:, 0], ids, values.gather(1, ids)
