"""Which part of each checkpoint tensor a rank holds, and where in its model it goes: one table and pure functions."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from manta.configs.model import ModelError, ModelSpec


class Place(Protocol):
    """Where a rank stands among those of its replica: a worker's Mesh, or one that is only planned."""

    @property
    def tp_rank(self) -> int: ...

    @property
    def tp_size(self) -> int: ...

    @property
    def pp_rank(self) -> int: ...

    @property
    def pp_size(self) -> int: ...

    @property
    def is_first_stage(self) -> bool: ...

    @property
    def is_last_stage(self) -> bool: ...


class WeightError(ModelError):
    """A checkpoint's weights do not fit its config; the message names the tensor and the file."""


@dataclass(frozen=True)
class Rule:
    """A checkpoint tensor of shape `dims` becomes `target`, behind the rows of the dims in `after`."""

    target: str
    dims: tuple[str, ...]
    after: tuple[str, ...] = ()


# The dims heads, kv_heads, intermediate and vocab are split over the tp ranks; a rule without them is held by all.
# fmt: off
MODEL_RULES = {
    "model.embed_tokens.weight":        Rule("embed.weight", ("vocab", "hidden")),
    "model.norm.weight":                Rule("norm.weight", ("hidden",)),
    "lm_head.weight":                   Rule("lm_head.weight", ("vocab", "hidden")),
}
LAYER_RULES = {
    "input_layernorm.weight":           Rule("input_norm.weight", ("hidden",)),
    "self_attn.q_proj.weight":          Rule("attention.qkv.weight", ("heads", "hidden")),
    "self_attn.k_proj.weight":          Rule("attention.qkv.weight", ("kv_heads", "hidden"), ("heads",)),
    "self_attn.v_proj.weight":          Rule("attention.qkv.weight", ("kv_heads", "hidden"), ("heads", "kv_heads")),
    "self_attn.q_proj.bias":            Rule("attention.qkv.bias", ("heads",)),
    "self_attn.k_proj.bias":            Rule("attention.qkv.bias", ("kv_heads",), ("heads",)),
    "self_attn.v_proj.bias":            Rule("attention.qkv.bias", ("kv_heads",), ("heads", "kv_heads")),
    "self_attn.q_norm.weight":          Rule("attention.q_norm.weight", ("head_dim",)),
    "self_attn.k_norm.weight":          Rule("attention.k_norm.weight", ("head_dim",)),
    "self_attn.o_proj.weight":          Rule("attention.o.weight", ("hidden", "heads")),
    "self_attn.o_proj.bias":            Rule("attention.o.bias", ("hidden",)),
    "post_attention_layernorm.weight":  Rule("mlp_norm.weight", ("hidden",)),
    "mlp.gate_proj.weight":             Rule("mlp.gate_up.weight", ("intermediate", "hidden")),
    "mlp.up_proj.weight":               Rule("mlp.gate_up.weight", ("intermediate", "hidden"), ("intermediate",)),
    "mlp.gate_proj.bias":               Rule("mlp.gate_up.bias", ("intermediate",)),
    "mlp.up_proj.bias":                 Rule("mlp.gate_up.bias", ("intermediate",), ("intermediate",)),
    "mlp.down_proj.weight":             Rule("mlp.down.weight", ("hidden", "intermediate")),
    "mlp.down_proj.bias":               Rule("mlp.down.bias", ("hidden",)),
}
# fmt: on
_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class WeightSlice:
    """A rank's part of one checkpoint tensor."""

    target: str  # parameter of the rank's CausalLM
    target_start: int  # its first row there
    shape: tuple[int, ...]  # of the whole tensor
    source: tuple[slice, ...]  # the part of it, one slice per axis


def dim_size(spec: ModelSpec, dim: str) -> int:
    """Length of a rule's dim in the checkpoint."""
    return {
        "hidden": spec.hidden_size,
        "head_dim": spec.head_dim,
        "vocab": spec.vocab_size,
        "heads": spec.num_heads * spec.head_dim,
        "kv_heads": spec.num_kv_heads * spec.head_dim,
        "intermediate": spec.intermediate_size,
    }[dim]


def dim_slice(spec: ModelSpec, place: Place, dim: str) -> slice:
    """The rank's part of a dim: whole heads, and a KV head on several ranks where there are fewer of them than ranks.

    Raises ModelError if the heads cannot be split over the tp ranks.
    """
    rank, tp_size = place.tp_rank, place.tp_size
    if dim in ("hidden", "head_dim"):
        return slice(0, dim_size(spec, dim))
    if dim == "vocab":
        rows = padded_vocab_size(spec, tp_size) // tp_size
        return slice(min(rank * rows, spec.vocab_size), min((rank + 1) * rows, spec.vocab_size))
    if dim == "intermediate":
        return slice(rank * spec.intermediate_size // tp_size, (rank + 1) * spec.intermediate_size // tp_size)
    if spec.num_heads % tp_size:
        raise ModelError(f"tensor_parallel_size={tp_size} must divide the model's {spec.num_heads} attention heads")
    if dim == "heads":
        num, first = spec.num_heads // tp_size, rank * spec.num_heads // tp_size
    elif spec.num_kv_heads % tp_size and tp_size % spec.num_kv_heads:
        raise ModelError(
            f"tensor_parallel_size={tp_size} must divide the model's {spec.num_kv_heads} KV heads or be a multiple"
        )
    else:
        num, first = num_local_kv_heads(spec, tp_size), rank * spec.num_kv_heads // tp_size
    return slice(first * spec.head_dim, (first + num) * spec.head_dim)


def local_size(spec: ModelSpec, place: Place, *dims: str) -> int:
    """Rows that the rank's parts of `dims` take together."""
    parts = [dim_slice(spec, place, dim) for dim in dims]
    return sum(part.stop - part.start for part in parts)


def num_local_kv_heads(spec: ModelSpec, tp_size: int) -> int:
    """KV heads on one rank."""
    return max(1, spec.num_kv_heads // tp_size)


def padded_vocab_size(spec: ModelSpec, tp_size: int) -> int:
    """The vocabulary rounded up so that every tp rank has equally many rows."""
    return -(-spec.vocab_size // tp_size) * tp_size


def stage_layers(num_layers: int, pp_rank: int, pp_size: int) -> range:
    """The stage's layers: contiguous, as even as can be, one more on the first stages if they do not divide."""
    size, remainder = divmod(num_layers, pp_size)
    first = pp_rank * size + min(pp_rank, remainder)
    return range(first, first + size + (pp_rank < remainder))


def weight_names(spec: ModelSpec) -> Iterator[str]:
    """Every tensor a checkpoint of this shape must have."""
    for name in MODEL_RULES:
        if name != "lm_head.weight" or (spec.has_lm_head and not spec.tie_word_embeddings):
            yield name
    for layer in range(spec.num_layers):
        for name in LAYER_RULES:
            if _has(spec, name):
                yield f"model.layers.{layer}.{name}"


def weight_slice(spec: ModelSpec, place: Place, name: str) -> WeightSlice | None:
    """The rank's part of the checkpoint tensor `name`, one of weight_names; None if its stage does not hold it."""
    prefix = ""
    layer_name = _LAYER_NAME.fullmatch(name)
    if layer_name:
        layers = stage_layers(spec.num_layers, place.pp_rank, place.pp_size)
        layer = int(layer_name[1])
        if layer not in layers:
            return None
        prefix = f"layers.{layer - layers.start}."
        rule = LAYER_RULES[layer_name[2]]
    else:
        rule = MODEL_RULES[name]
        if rule.target == "embed.weight" and not place.is_first_stage:
            if not (spec.has_lm_head and spec.tie_word_embeddings and place.is_last_stage):
                return None
            rule = MODEL_RULES["lm_head.weight"]
        elif rule.target != "embed.weight" and not place.is_last_stage:
            return None
    return WeightSlice(
        target=prefix + rule.target,
        target_start=local_size(spec, place, *rule.after),
        shape=tuple(dim_size(spec, dim) for dim in rule.dims),
        source=tuple(dim_slice(spec, place, dim) for dim in rule.dims),
    )


def weight_bytes(spec: ModelSpec, place: Place, itemsize_of: Callable[[str], int]) -> int:
    """Of a rank's parts of the checkpoint. itemsize_of: bytes per value of the tensor with this name; kernels may pack
    them into a little more, and scales are not counted."""
    num_bytes = 0
    for name in weight_names(spec):
        part = weight_slice(spec, place, name)
        if part is not None:
            num_bytes += math.prod(axis.stop - axis.start for axis in part.source) * itemsize_of(name)
    return num_bytes


def _has(spec: ModelSpec, name: str) -> bool:
    """Whether layers of this model have the tensor LAYER_RULES calls `name`."""
    if name.endswith("_norm.weight"):
        return spec.qk_norm
    if not name.endswith(".bias"):
        return True
    if name.startswith("mlp."):
        return spec.mlp_bias
    return spec.o_bias if name == "self_attn.o_proj.bias" else spec.qkv_bias
