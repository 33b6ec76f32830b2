"""Brings fp8 weights with their scales, and the scales of KV pages, from a checkpoint to where the model has them."""

import logging

import torch
from torch import Tensor

from manta.configs.weights import WeightError, WeightSlice, stage_layers
from manta.workers.fp8_checkpoint import ScaledCheckpoint
from manta.workers.models.decoder import CausalLM

logger = logging.getLogger(__name__)


def read_weight(
    checkpoint: ScaledCheckpoint, parameters: dict[str, Tensor], name: str, part: WeightSlice, dtype: torch.dtype
) -> Tensor:
    """This rank's part of the tensor `name`: fp8 where the parameter it goes to is, else of dtype or as it is stored.

    Of fp8 weights the scales are put in place here: those of the part's rows; of linears that are one product here, the
    largest of their input scales. Raises WeightError.
    """
    if parameters[part.target].dtype != torch.float8_e4m3fn:
        return checkpoint.read_wide(name, part.source, dtype)
    tensor = checkpoint.read(name, part.source)
    if tensor.dtype != torch.float8_e4m3fn:
        raise WeightError(f"tensor {name!r} of {checkpoint.folder} is {tensor.dtype}; config.json makes it fp8")
    linear = part.target.removesuffix(".weight")
    rows = parameters[f"{linear}.weight_scale"][part.target_start : part.target_start + tensor.shape[0]]
    rows.copy_(checkpoint.row_scales(name, part.source))
    input_scale = parameters.get(f"{linear}.input_scale")
    if input_scale is not None:
        input_scale.copy_(torch.maximum(input_scale, checkpoint.input_scale(name).to(input_scale.device)))
    return tensor


def set_kv_scales(model: CausalLM, found: dict[str, Tensor]) -> None:
    """Of a model with fp8 pages; 1 stands for what the checkpoint has not, as ScaledCheckpoint.kv_scales names it."""
    if not model.format.has_fp8_pages:
        return
    missing = 0
    local = stage_layers(model.spec.num_layers, model.mesh.pp_rank, model.mesh.pp_size)
    for index, layer in zip(local, model.layers, strict=True):
        for which, scale in zip("kv", layer.attention.kv_scales, strict=True):  # type: ignore[union-attr, arg-type]
            value = found.get(f"model.layers.{index}.{which}_scale")
            missing += value is None
            if value is not None:
                scale.copy_(value)
    if missing:
        logger.warning(
            "the checkpoint lacks %d of %d scales of keys and values; fp8 KV blocks take 1.0 for them, which costs "
            "accuracy where values are beyond 448 or far below it", missing, 2 * len(local)
        )  # fmt: skip
