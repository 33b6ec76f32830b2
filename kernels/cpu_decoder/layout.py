"""How KV pages lie in memory on the CPU: as the right-hand sides of the two products of attention.

Keys of 16 tokens are the columns of q @ k.T, so a page holds them as [tokens / 16][dim][16]; values are the rows of
weights @ v, [tokens][dim]. bfloat16 has two consecutive rows side by side, as tiles read them: keys [tokens / 16]
[dim / 2][16][2], values [tokens / 2][dim][2]. Tokens and dims are padded to multiples of 16.
"""

import torch
from torch import Tensor

from manta.kernels.cpu_decoder.tiles import LANES


def padded(size: int) -> int:
    """The least multiple of 16 that holds `size`."""
    return -(-size // LANES) * LANES


def page_shape(block_size: int, head_dim: int) -> tuple[int, int]:
    """What a page of block_size tokens of one head takes: elements by their padded counts of tokens and dims."""
    return padded(block_size), padded(head_dim)


def to_pages(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """[num_blocks, num_kv_heads, block_size, head_dim] as others lay it out -> the same as pages of this layout.

    Slow; for tests, and for cache contents that come from elsewhere.
    """
    *outer, block_size, dim = keys.shape
    tokens, dims = page_shape(block_size, dim)
    wide = []
    for tensor in (keys, values):
        page = tensor.new_zeros(*outer, tokens, dims)
        page[..., :block_size, :dim] = tensor
        wide.append(page)
    k, v = wide
    k = k.view(*outer, tokens // LANES, LANES, dims).transpose(-1, -2)  # [..., panels, dims, 16]
    if k.dtype == torch.bfloat16:
        k = k.reshape(*k.shape[:-2], dims // 2, 2, LANES).transpose(-1, -2)
        v = v.view(*outer, tokens // 2, 2, dims).transpose(-1, -2)
    return tuple(t.contiguous().view(*outer, tokens, dims) for t in (k, v))  # type: ignore[return-value]


def from_pages(keys: Tensor, values: Tensor, block_size: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """The inverse of to_pages."""
    *outer, tokens, dims = keys.shape
    if keys.dtype == torch.bfloat16:
        k = keys.view(*outer, tokens // LANES, dims // 2, LANES, 2).transpose(-1, -2).flatten(-3, -2)
        v = values.view(*outer, tokens // 2, dims, 2).transpose(-1, -2).flatten(-3, -2)
    else:
        k, v = keys.view(*outer, tokens // LANES, dims, LANES), values
    k = k.transpose(-1, -2).flatten(-3, -2)
    return k[..., :block_size, :head_dim].contiguous(), v[..., :block_size, :head_dim].contiguous()
