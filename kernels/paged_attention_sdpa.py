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
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Same contract as reference.paged_attention. Decode rows and prefill rows are attended apart.

    The scale of fp8 keys is applied to the queries, that of values to the result: gathered pages are only widened.
    """
    if k_scale is not None:
        q = (q.float() * k_scale).to(q.dtype)
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
    out = out[:num_tokens].reshape(q.shape)
    return out if v_scale is None else (out.float() * v_scale).to(out.dtype)


def _groups(first: int, last: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, last)) for start in range(first, last, size))


def _gathered(cache: Tensor, tables: Tensor) -> Tensor:
    """Pages by tables [rows, blocks]; bytes of fp8, which not every device can index."""
    if cache.element_size() == 1:
        return cache.view(torch.uint8)[tables].view(cache.dtype)
    return cache[tables]


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
    k, v = (_gathered(cache, tables).to(q.dtype).transpose(1, 2).reshape(shape) for cache in (keys, values))
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
