"""A prompt that becomes one vector: which of its tokens count, and what is made of their sum."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from manta.protos.sampling_pb2 import Pooling
from manta.workers.columns import PlanError

KINDS = frozenset(Pooling.Kind.values())


@dataclass(slots=True)
class PooledPrompt:
    """Of one stay of one sequence in its slot. `sum` is of the steps so far, and the pooler's."""

    kind: int
    num_dims: int
    normalizes: bool
    num_tokens: int
    sum: Tensor | None = None  # float32 [hidden], on the device

    @classmethod
    def of(cls, slot: int, pooling: Pooling, num_tokens: int, num_computed: int) -> Self:
        """Raises PlanError."""
        if pooling.kind not in KINDS or not pooling.num_dims:
            raise PlanError(f"slot {slot}: pooling of kind {pooling.kind} to {pooling.num_dims} values")
        if num_computed and pooling.kind != Pooling.LAST:
            raise PlanError(f"slot {slot}: {num_computed} tokens are computed whose hidden states would count")
        return cls(pooling.kind, pooling.num_dims, pooling.normalizes, num_tokens)

    def part(self, start: int, num_tokens: int) -> range:
        """Of the tokens from position `start` on that a step computes, those that count."""
        if self.kind == Pooling.MEAN:
            return range(num_tokens)
        if self.kind == Pooling.CLS:
            return range(int(start == 0))
        return range(num_tokens - 1 if self.ends_with(start, num_tokens) else num_tokens, num_tokens)

    def ends_with(self, start: int, num_tokens: int) -> bool:
        return start + num_tokens == self.num_tokens

    def finish(self, total: NDArray[np.float32]) -> NDArray[np.float32]:
        """The sum float32 [hidden] of all that count -> the vector, float32 [num_dims]. Shorter vectors are the first
        values of the whole one, brought to length 1 again (Kusupati et al., "Matryoshka Representation Learning",
        2022)."""
        vector = total[: self.num_dims]
        if self.kind == Pooling.MEAN:
            vector = vector / np.float32(self.num_tokens)
        if self.normalizes:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        return vector.astype("<f4", copy=False)
