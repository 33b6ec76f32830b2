"""A decoder of the Llama kind in plain torch and float64, without cache, paging or fused anything: an oracle."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from manta.kernels.cpu_decoder.shape import LayerWeights, Linear, StageShape


@dataclass(frozen=True)
class Sizes:
    """Shape and features of a random decoder; windows has one entry for each layer."""

    hidden: int = 48
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 16
    intermediate: int = 80
    vocab: int = 70
    windows: tuple[int | None, ...] = (None, None)
    has_biases: bool = False
    has_qk_norm: bool = False
    eps: float = 1e-5

    @property
    def stage_shape(self) -> StageShape:
        return StageShape(
            self.hidden, self.num_heads, self.num_kv_heads, self.head_dim, self.intermediate, self.eps, is_split=False
        )


@dataclass
class PlainDecoder:
    """Random weights in `dtype`, and what they compute."""

    sizes: Sizes
    dtype: torch.dtype
    layers: list[LayerWeights] = field(init=False)
    norm: Tensor = field(init=False)
    head: Tensor = field(init=False)

    def __post_init__(self) -> None:
        sizes = self.sizes
        self.layers = [self._random_layer(window) for window in sizes.windows]
        self.norm = self._random_norm(sizes.hidden)
        self.head = self._random_linear(sizes.vocab, sizes.hidden, has_bias=False).weight

    def _random_norm(self, size: int) -> Tensor:
        return (torch.rand(size) + 0.5).to(self.dtype)

    def _random_linear(self, num_out: int, num_in: int, *, has_bias: bool) -> Linear:
        weight = (torch.randn(num_out, num_in) * num_in**-0.5).to(self.dtype)
        return Linear(weight, torch.randn(num_out).to(self.dtype) if has_bias else None)

    def _random_layer(self, window: int | None) -> LayerWeights:
        sizes, has_bias = self.sizes, self.sizes.has_biases
        heads = sizes.num_heads * sizes.head_dim
        qkv = heads + 2 * sizes.num_kv_heads * sizes.head_dim
        return LayerWeights(
            input_norm=self._random_norm(sizes.hidden),
            qkv=self._random_linear(qkv, sizes.hidden, has_bias=has_bias),
            q_norm=self._random_norm(sizes.head_dim) if sizes.has_qk_norm else None,
            k_norm=self._random_norm(sizes.head_dim) if sizes.has_qk_norm else None,
            o=self._random_linear(sizes.hidden, heads, has_bias=has_bias),
            mlp_norm=self._random_norm(sizes.hidden),
            gate_up=self._random_linear(2 * sizes.intermediate, sizes.hidden, has_bias=has_bias),
            down=self._random_linear(sizes.hidden, sizes.intermediate, has_bias=has_bias),
            window=window,
        )

    def rope_table(self, num_positions: int) -> Tensor:
        """float32 [num_positions, head_dim]: cosines, then sines."""
        half = self.sizes.head_dim // 2
        frequencies = 100.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float64), frequencies)
        return torch.cat((angles.cos(), angles.sin()), dim=1).float()

    def hidden(self, x: Tensor) -> Tensor:
        """x [n, hidden], one whole sequence -> float64 [n, hidden], normed. Keys and values are rounded to `dtype`, as
        a cache holds them."""
        x = x.double()
        for layer in self.layers:
            x = x + self._attention(layer, self._normed(x, layer.input_norm))
            gate, up = _product(layer.gate_up, self._normed(x, layer.mlp_norm)).chunk(2, dim=-1)
            x = x + _product(layer.down, gate * gate.sigmoid() * up)
        return self._normed(x, self.norm)

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        return x / (x.square().mean(dim=-1, keepdim=True) + self.sizes.eps).sqrt() * weight.double()

    def _attention(self, layer: LayerWeights, x: Tensor) -> Tensor:
        sizes, length = self.sizes, x.shape[0]
        heads = _product(layer.qkv, x).view(length, -1, sizes.head_dim).transpose(0, 1)
        q, k, v = heads.split((sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads))
        q, k = (self._rotated(self._normed(t, w)) for t, w in ((q, layer.q_norm), (k, layer.k_norm)))
        group = sizes.num_heads // sizes.num_kv_heads
        k, v = (t.to(self.dtype).double().repeat_interleave(group, dim=0) for t in (k, v))
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        unseen = (distance < 0) | (distance >= (layer.window or length))
        scores = (q @ k.transpose(1, 2) * sizes.head_dim**-0.5).masked_fill(unseen, -torch.inf)
        return _product(layer.o, (scores.softmax(dim=-1) @ v).transpose(0, 1).flatten(1))

    def _rotated(self, heads: Tensor) -> Tensor:
        cos, sin = self.rope_table(heads.shape[1]).double().chunk(2, dim=-1)
        a, b = heads.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _product(linear: Linear, x: Tensor) -> Tensor:
    out = x @ linear.weight.double().T
    return out if linear.bias is None else out + linear.bias.double()
