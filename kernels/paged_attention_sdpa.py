"""Attention over the paged KV cache through torch's scaled_dot_product_attention, on any device.

Pages are gathered and rows padded to the longest; it is what a device without a kernel of its own gets. Rows and
queries are taken in turns, so that memory does not grow with the step. Shapes come from the metadata's Python numbers:
nothing waits for the device.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from manta.kernels.metadata import AttentionMetadata

MAX_VALUES = 1 << 27  # in one tensor of keys, values or scores, unless a single row with a single query has more


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, scale: float, window: int | None = None
) -> Tensor:
    """Same contract as reference.paged_attention. Decode rows and prefill rows are attended apart."""
    num_tokens, num_decodes, longest = q.shape[0], metadata.num_decodes, metadata.max_query_len
    heads = q.view(num_tokens, -1, keys.shape[3])  # [T, num_heads, head_dim]
    out = heads.new_empty(num_tokens + 1, *heads.shape[1:])  # one token more takes what is computed of padding
    max_rows = max(1, MAX_VALUES // (heads[0].numel() * metadata.max_seq_len))
    for rows in _groups(0, num_decodes, max_rows):
        decodes = heads[rows, :, None]  # [rows, num_heads, 1, head_dim]
        out[rows] = _attend_rows(decodes, keys, values, metadata, rows, scale, window)[:, :, 0]
    for rows in _groups(num_decodes, metadata.num_rows, max_rows):
        starts = metadata.query_start[rows.start : rows.stop + 1].long()
        tokens = starts[:-1, None] + torch.arange(longest, device=q.device)  # [rows, longest]; short rows read on
        prefills = heads[tokens.clamp(max=num_tokens - 1)].transpose(1, 2)  # [rows, num_heads, longest, head_dim]
        attended = _attend_rows(prefills, keys, values, metadata, rows, scale, window)
        out[torch.where(tokens < starts[1:, None], tokens, num_tokens)] = attended.transpose(1, 2)
    return out[:num_tokens].reshape(q.shape)


def _groups(first: int, last: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, last)) for start in range(first, last, size))


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
    num_rows, num_heads, num_queries, dim = q.shape
    num_kv_heads, block_size = keys.shape[1:3]
    num_blocks = -(-metadata.max_seq_len // block_size)
    tables = metadata.block_tables[rows, :num_blocks].long()
    shape = (num_rows, num_kv_heads, num_blocks * block_size, dim)
    k, v = (cache[tables].transpose(1, 2).reshape(shape) for cache in (keys, values))
    starts = metadata.query_start[rows.start : rows.stop + 1]
    first_position = metadata.seq_lens[rows] - (starts[1:] - starts[:-1])  # [rows]
    offsets = torch.arange(num_queries, device=q.device)
    query_position = (first_position[:, None] + offsets)[:, None, :, None]  # [rows, 1, queries, 1]
    key_position = torch.arange(k.shape[2], device=q.device)
    out = torch.empty_like(q)
    for tile in _groups(0, num_queries, max(1, MAX_VALUES // (num_rows * num_heads * k.shape[2]))):
        seen = key_position <= query_position[:, :, tile]
        if window is not None:
            seen &= key_position > query_position[:, :, tile] - window
        out[:, :, tile] = F.scaled_dot_product_attention(
            q[:, :, tile], k, v, attn_mask=seen, scale=scale, enable_gqa=True
        )
    return out
