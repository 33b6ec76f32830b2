"""What a rank's layers consist of, for whoever runs them as one; imports no compiler."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Linear:
    """weight [out, in] and bias [out]."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer as this rank holds it. Norms are [size]; gate_up is [2 * intermediate, hidden], gate first."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    window: int | None


@dataclass(frozen=True, slots=True)
class StageShape:
    """Sizes of this rank's part."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    is_split: bool  # whether ranks must sum what o and down give
