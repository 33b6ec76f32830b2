"""Attention over the paged KV cache through torch's scaled_dot_product_attention, on any device.

Pages are gathered, so this costs memory in proportion to rows x longest sequence; it is what a device without a kernel
of its own gets. Shapes come from the metadata's Python numbers: nothing waits for the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from manta.kernels.metadata import AttentionMetadata


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, scale: float, window: int | None = None
) -> Tensor:
    """Same contract as reference.paged_attention. Decode rows and prefill rows are attended apart, each padded."""
    num_decodes, dim = metadata.num_decodes, keys.shape[3]
    heads = q.view(q.shape[0], -1, dim)  # [T, num_heads, head_dim]
    parts = []
    if num_decodes:
        rows = slice(0, num_decodes)
        decodes = heads[:num_decodes, :, None]  # [rows, num_heads, 1, head_dim]
        parts.append(_attend_rows(decodes, keys, values, metadata, rows, scale, window)[:, :, 0])
    if metadata.num_rows > num_decodes:
        parts.append(_attend_prefills(heads, keys, values, metadata, scale, window))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.reshape(q.shape)


def _attend_prefills(
    heads: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, scale: float, window: int | None
) -> Tensor:
    """[T, num_heads, head_dim] -> the prefill rows' part of it."""
    first, longest = metadata.num_decodes, metadata.max_query_len
    starts = metadata.query_start[first:].long()  # [rows + 1]
    offsets = torch.arange(longest, device=heads.device)
    tokens = (starts[:-1, None] + offsets).clamp_(max=heads.shape[0] - 1)  # [rows, longest]; short rows read on
    padded = heads[tokens].transpose(1, 2)  # [rows, num_heads, longest, head_dim]
    out = _attend_rows(padded, keys, values, metadata, slice(first, metadata.num_rows), scale, window)
    token = torch.arange(first, heads.shape[0], device=heads.device)
    row = torch.searchsorted(starts, token, right=True) - 1
    return out[row, :, token - starts[row]]


def _attend_rows(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    metadata: AttentionMetadata,
    rows: slice,
    scale: float,
    window: int | None,
) -> Tensor:
    """q: [rows, num_heads, queries, head_dim], row by row from its first query on. Returns the same shape."""
    num_kv_heads, block_size, dim = keys.shape[1:]
    num_blocks = -(-metadata.max_seq_len // block_size)
    tables = metadata.block_tables[rows, :num_blocks].long()
    shape = (tables.shape[0], num_kv_heads, num_blocks * block_size, dim)
    k, v = (cache[tables].transpose(1, 2).reshape(shape) for cache in (keys, values))
    starts = metadata.query_start[rows.start : rows.stop + 1]
    first_position = metadata.seq_lens[rows] - (starts[1:] - starts[:-1])  # [rows]
    offsets = torch.arange(q.shape[2], device=q.device)
    query_position = (first_position[:, None] + offsets)[:, None, :, None]  # [rows, 1, queries, 1]
    key_position = torch.arange(k.shape[2], device=q.device)
    seen = key_position <= query_position
    if window is not None:
        seen &= key_position > query_position - window
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
