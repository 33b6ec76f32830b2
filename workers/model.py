"""What runners need of a model."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from manta.kernels.metadata import AttentionMetadata, KVCache


class Model(Protocol):
    """`models.decoder.CausalLM` is one."""

    def __call__(
        self, x: Tensor, metadata: AttentionMetadata, kv_cache: KVCache, sampled: Tensor | None = None
    ) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class HiddenShape:
    """What travels between stages: rows of `size` values."""

    size: int
    dtype: torch.dtype
