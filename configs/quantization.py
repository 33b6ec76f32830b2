"""What config.json says about a checkpoint whose weights are fp8: as vLLM's and compressed-tensors' tools write it."""

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class QuantizationError(ValueError):
    """The checkpoint is quantised in a way that Manta does not serve; the message says which."""


class QuantizationSpec(BaseModel):
    """fp8 (e4m3) weights of linear layers. Frozen.

    scales: of weights, one per tensor, per output channel, or per block. has_input_scales: whether activations are
    quantised by stored scales, one per linear; else each token by its own. weights_only: they are not quantised.
    ignored: linears that are not quantised, by their names in the checkpoint; "re:" begins a regular expression.
    """

    model_config = ConfigDict(frozen=True)

    scales: Literal["tensor", "channel", "block"]
    block: tuple[int, int] | None = None  # output channels and inputs of a block
    has_input_scales: bool = False
    weights_only: bool = False
    ignored: tuple[str, ...] = ()

    def quantizes(self, linear: str) -> bool:
        """Whether the weight of a linear layer, such as "model.layers.0.mlp.down_proj", is fp8."""
        for name in self.ignored:
            if name.startswith("re:"):
                if re.match(name.removeprefix("re:"), linear):
                    return False
            elif linear == name or linear.startswith(f"{name}.") or linear.endswith(f".{name}"):
                return False
        return True


def parse_quantization(config: dict[str, Any]) -> QuantizationSpec:
    """Of config.json's `quantization_config` (or `compression_config`). Raises QuantizationError."""
    method = str(config.get("quant_method") or "(none)")
    if method == "fp8":
        return _parse_fp8(config)
    if method == "compressed-tensors":
        return _parse_compressed_tensors(config)
    raise QuantizationError(
        f"checkpoints quantized by {method!r} are not supported; use one in fp8 (quant_method fp8 or "
        f"compressed-tensors), or one with bf16, fp16 or fp32 weights"
    )


def _parse_fp8(config: dict[str, Any]) -> QuantizationSpec:
    scheme = str(config.get("activation_scheme", "dynamic"))
    if scheme not in ("static", "dynamic"):
        raise QuantizationError(f"activation_scheme {scheme!r} is not supported; supported: static, dynamic")
    block = config.get("weight_block_size")
    ignored = config.get("ignored_layers") or config.get("modules_to_not_convert") or ()
    return QuantizationSpec(
        scales="tensor" if block is None else "block",
        block=None if block is None else (int(block[0]), int(block[1])),
        has_input_scales=scheme == "static",
        ignored=tuple(ignored),
    )


def _parse_compressed_tensors(config: dict[str, Any]) -> QuantizationSpec:
    groups = list((config.get("config_groups") or {}).values())
    if len(groups) != 1:
        raise QuantizationError(f"compressed-tensors with {len(groups)} config_groups is not supported, only with one")
    weights, inputs = groups[0].get("weights") or {}, groups[0].get("input_activations")
    _check_type("weights", weights)
    strategy = str(weights.get("strategy"))
    if strategy not in ("tensor", "channel", "block"):
        raise QuantizationError(f"weights with scales per {strategy} are not supported: per tensor, channel or block")
    if inputs is not None:
        _check_type("input_activations", inputs)
    has_input_scales = inputs is not None and not inputs.get("dynamic", False)
    block = weights.get("block_structure") if strategy == "block" else None
    return QuantizationSpec(
        scales=strategy,  # type: ignore[arg-type]  # checked above
        block=None if block is None else (int(block[0]), int(block[1])),
        has_input_scales=has_input_scales,
        weights_only=inputs is None,
        ignored=tuple(config.get("ignore") or ()),
    )


def _check_type(what: str, scheme: dict[str, Any]) -> None:
    kind, num_bits = scheme.get("type"), scheme.get("num_bits")
    if kind != "float" or num_bits != 8:
        raise QuantizationError(f"compressed-tensors {what} of {num_bits} bits, {kind}, are not supported, only fp8")
