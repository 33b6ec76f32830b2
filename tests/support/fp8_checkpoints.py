"""Checkpoints with fp8 weights in the formats in use, and transformers models that compute what they mean."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from tests.support.checkpoints import make_checkpoint, make_model

BLOCK = (32, 16)
INPUT_SCALE = 0.02  # of the first linear; each of the others has one a little larger
_COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head", "re:.*layers.1.*down_proj"],
}
_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
# name -> quantization_config of config.json
FORMATS: dict[str, dict[str, Any]] = {
    "fp8-dynamic": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "fp8-static": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
    "fp8-block": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)},
    "compressed-channel": _COMPRESSED
    | {"config_groups": {"group_0": {
        "targets": ["Linear"], "weights": _WEIGHTS,
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    }}},
    "compressed-static": _COMPRESSED
    | {"config_groups": {"group_0": {
        "targets": ["Linear"], "weights": _WEIGHTS | {"strategy": "tensor"},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    }}},
}  # fmt: skip


def make_fp8_checkpoint(folder: Path, family: str, format: str, **overrides: Any) -> Path:
    """`make_checkpoint` with the weights of its linears in fp8."""
    make_checkpoint(folder, family, **overrides)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = FORMATS[format]
    (folder / "config.json").write_text(json.dumps(config))
    model = make_model(family, **overrides)
    for index, (name, linear) in enumerate(quantized_linears(model, format)):
        values, scale = quantized_weight(linear.weight, format)
        tensors[f"{name}.weight"] = values
        block = format == "fp8-block"
        tensors[f"{name}.weight_scale{'_inv' if block else ''}"] = scale.bfloat16() if "channel" in format else scale
        if "static" in format:
            tensors[f"{name}.input_scale"] = torch.tensor(INPUT_SCALE * (1 + index / 100))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def quantized_linears(model: PreTrainedModel, format: str) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        if "compressed" not in format or not ("layers.1." in name and name.endswith("down_proj")):
            yield name, module


def quantized_weight(weight: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Values and scales as the format stores them."""
    if format == "fp8-block":
        rows, columns = (-(-size // step) for size, step in zip(weight.shape, BLOCK, strict=True))
        scale = torch.empty(rows, columns)
        for i in range(rows):
            for j in range(columns):
                part = weight[i * BLOCK[0] : (i + 1) * BLOCK[0], j * BLOCK[1] : (j + 1) * BLOCK[1]]
                scale[i, j] = part.abs().max() / 448
    elif format in ("compressed-channel", "online"):
        scale = weight.abs().amax(dim=1, keepdim=True) / 448
        scale = scale if format == "online" else scale.bfloat16().float()
    else:
        scale = weight.abs().max() / 448
    spread = scale
    if format == "fp8-block":
        spread = scale.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
        spread = spread[: weight.shape[0], : weight.shape[1]]
    return (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def meant_model(
    family: str, format: str, *, with_inputs: bool, num_ranks: int = 1, **overrides: Any
) -> PreTrainedModel:
    """transformers' model with the weights the checkpoint stands for; with_inputs: activations quantised, too, where a
    linear's inputs are split over ranks, by each for its part."""
    model = make_model(family, **overrides)
    scales: dict[str, float] = {}
    for index, (name, linear) in enumerate(quantized_linears(model, format)):
        values, scale = quantized_weight(linear.weight, format)
        if format == "fp8-block":
            scale = scale.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
            scale = scale[: linear.weight.shape[0], : linear.weight.shape[1]]
        linear.weight.data = values.float() * scale
        # Linears that are one product have the largest of their scales.
        group = name.replace("q_proj", "v_proj").replace("k_proj", "v_proj").replace("gate_proj", "up_proj")
        scales[group] = max(scales.get(group, 0.0), INPUT_SCALE * (1 + index / 100))
    for name, linear in quantized_linears(model, format) if with_inputs else ():
        group = name.replace("q_proj", "v_proj").replace("k_proj", "v_proj").replace("gate_proj", "up_proj")
        num_parts = num_ranks if name.endswith(("o_proj", "down_proj")) else 1
        linear.register_forward_pre_hook(_rounding(scales[group] if "static" in format else None, num_parts))
    return model


def _rounding(scale: float | None, num_parts: int) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    def hook(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        x = inputs[0].unflatten(-1, (num_parts, -1))
        by = x.abs().amax(dim=-1, keepdim=True) / 448 if scale is None else torch.tensor(scale)
        return (((x / by).clamp(-448, 448).to(torch.float8_e4m3fn).float() * by).flatten(-2),)

    return hook


def with_fp8_pages(model: PreTrainedModel, scales: list[tuple[float, float]]) -> PreTrainedModel:
    """The model with keys and values rounded to fp8, by each layer's scales of both."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        k_scale, v_scale = scales[module.layer_idx]
        key = (key / k_scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * k_scale
        value = (value / v_scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * v_scale
        return eager_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("fp8_pages", attend)
    AttentionMaskInterface.register("fp8_pages", eager_mask)
    model.config._attn_implementation = "fp8_pages"
    return model
