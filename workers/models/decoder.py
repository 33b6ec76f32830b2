"""A decoder of the Llama kind; ModelSpec says in what an architecture differs."""

import torch
from torch import Tensor, nn

from manta.configs.model import ModelSpec
from manta.kernels.metadata import AttentionMetadata, KVCache
from manta.workers.mesh import Mesh


class CausalLM(nn.Module):
    """One rank's share of the model: its stage's layers, its tp rank's part of each."""

    num_local_layers: int
    num_local_kv_heads: int

    def __init__(self, spec: ModelSpec, mesh: Mesh, dtype: torch.dtype) -> None:
        super().__init__()
        raise NotImplementedError

    def forward(self, x: Tensor, metadata: AttentionMetadata, kv_cache: KVCache) -> Tensor:
        """Token ids int64 [T] on the first stage, hidden [T, hidden_size] on later ones -> hidden [T, hidden_size]."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden_size] -> float32 [R, vocab_size], the same on every tp rank of the last stage."""
        raise NotImplementedError


def allocate_kv_cache(
    model: CausalLM, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """Per local layer, keys and values [num_blocks, num_local_kv_heads, block_size, head_dim], zeroed."""
    raise NotImplementedError
