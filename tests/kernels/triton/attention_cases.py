"""Steps, pages and the expected values of paged attention, for the tests of its GPU forms."""

from dataclasses import replace

import torch
from torch import Tensor

from manta.kernels.metadata import AttentionMetadata
from tests.support.paging import PagedSequences

# (query heads, KV heads, head size, block size)
SHAPES = [
    (1, 1, 16, 16),
    (6, 2, 20, 16),
    (9, 3, 64, 32),
    (20, 1, 80, 16),
    (4, 4, 96, 64),
    (8, 2, 128, 128),
    (2, 1, 256, 32),
]
# Earlier tokens of each sequence, then (sequence, new tokens) of the step.
STEPS: dict[str, tuple[list[int], list[tuple[int, int]]]] = {
    "decode": ([1, 63, 64, 130], [(0, 1), (1, 1), (2, 1), (3, 1)]),
    "mixed": ([130, 0, 64, 9], [(0, 1), (1, 1), (3, 7), (4, 37), (2, 1)]),
    "prefill": ([0, 65], [(0, 38), (1, 20)]),
}
NUM_BLOCKS = 60


def make_step(name: str, block_size: int, device: torch.device) -> AttentionMetadata:
    earlier, rows = STEPS[name]
    sequences = PagedSequences(block_size, NUM_BLOCKS)
    sequences.step([(i, count) for i, count in enumerate(earlier) if count])
    return to_device(sequences.step(rows), device)


def to_device(metadata: AttentionMetadata, device: torch.device) -> AttentionMetadata:
    names = ("query_start", "seq_lens", "block_tables", "slot_mapping", "positions")
    return replace(metadata, **{name: getattr(metadata, name).to(device) for name in names})


def make_tensors(
    metadata: AttentionMetadata, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q (rows apart, as the model passes it), keys and values. What no row owns is NaN: nothing may depend on it."""
    num_heads, num_kv_heads, dim, block_size = shape
    device = metadata.positions.device
    generator = torch.Generator().manual_seed(5)
    pages = (NUM_BLOCKS, num_kv_heads, block_size, dim)
    owned = torch.zeros(NUM_BLOCKS, 1, block_size, 1, dtype=torch.bool)
    for length, table in zip(metadata.seq_lens.tolist(), metadata.block_tables.tolist(), strict=True):
        for position in range(length):
            owned[table[position // block_size], 0, position % block_size] = True
    keys, values = (torch.randn(pages, generator=generator).masked_fill(~owned, torch.nan) for _ in range(2))
    qkv = torch.randn(metadata.positions.shape[0], (num_heads + 2 * num_kv_heads) * dim, generator=generator)
    q, keys, values = (x.to(device, dtype) for x in (qkv, keys, values))
    return q[:, : num_heads * dim], keys, values


def attention_by_sdpa(
    q: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, scale: float, window: int | None
) -> Tensor:
    """Row by row, each row's keys gathered, by torch's scaled_dot_product_attention in float64, on the CPU."""
    q, keys, values = (x.cpu().double() for x in (q, keys, values))
    num_kv_heads, block_size, dim = keys.shape[1:]
    starts, out = metadata.query_start.tolist(), torch.zeros_like(q)
    for row, length in enumerate(metadata.seq_lens.tolist()):
        first, last = starts[row], starts[row + 1]
        blocks = metadata.block_tables[row, : -(-length // block_size)].cpu().long()
        k, v = (x[blocks].transpose(0, 1).reshape(num_kv_heads, -1, dim)[:, :length] for x in (keys, values))
        heads = q[first:last].view(last - first, -1, dim).transpose(0, 1)
        query, key = torch.arange(length - (last - first), length)[:, None], torch.arange(length)[None, :]
        seen = (key <= query) & (key > query - (window or length))
        attended = torch.nn.functional.scaled_dot_product_attention(
            heads[None], k[None], v[None], attn_mask=seen, scale=scale, enable_gqa=True
        )
        out[first:last] = attended[0].transpose(0, 1).reshape(last - first, -1)
    return out
