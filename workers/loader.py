"""Fills a rank's model from a checkpoint."""

from pathlib import Path

import torch
from torch import Tensor

from manta.configs.model import ModelSpec
from manta.configs.weights import WeightError, WeightSlice, weight_names, weight_slice
from manta.workers.checkpoint import Checkpoint
from manta.workers.checkpoint_files import Files
from manta.workers.dummy_weights import random_weight
from manta.workers.formats import Format
from manta.workers.fp8_checkpoint import ScaledCheckpoint
from manta.workers.fp8_weights import read_weight, set_kv_scales
from manta.workers.mesh import Mesh
from manta.workers.models.decoder import CausalLM
from manta.workers.read_order import disk_order, in_disk_order
from manta.workers.staging import Stager


def load_model(
    source: Path | Files,
    spec: ModelSpec,
    mesh: Mesh,
    dtype: torch.dtype,
    *,
    load_format: str = "auto",
    seed: int = 0,
    format: Format | None = None,
) -> CausalLM:
    """The rank's part of the model, weights in place and prepacked.

    load_format "dummy" gives random weights that depend on `seed` alone, not on the mesh; any other reads safetensors.
    Without a `format` nothing is fp8 here, and weights that are fp8 in the checkpoint are widened.
    Raises WeightError naming tensor and file.
    """
    model = CausalLM(spec, mesh, dtype, format)
    slices = {name: part for name in weight_names(spec) if (part := weight_slice(spec, mesh, name)) is not None}
    parameters = _parameters(model)
    stager = Stager(mesh.device)
    if load_format == "dummy":
        for name, part in slices.items():
            whole = random_weight(name, part.shape, dtype, seed, mesh.device)
            _place(stager, parameters, part, whole[part.source])
    else:
        with Checkpoint(source) as files:
            checkpoint = ScaledCheckpoint(files, spec.quantization)
            _check_names(checkpoint, spec)
            for name, part in slices.items():
                _check_shape(checkpoint, name, part.shape)
            files.expect({name: slices[name].source for name in disk_order(files, slices)})
            for name in in_disk_order(files, slices, ahead=files.is_local and mesh.device.type == "cuda"):
                part = slices[name]
                _place(stager, parameters, part, read_weight(checkpoint, parameters, name, part, dtype))
            set_kv_scales(model, checkpoint.kv_scales())
    stager.finish()
    model.prepare()
    return model


def _parameters(model: CausalLM) -> dict[str, Tensor]:
    """By name, zeroed: a vocabulary's padding stays so."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.zero_()
    return parameters


def _place(stager: Stager, parameters: dict[str, Tensor], part: WeightSlice, tensor: Tensor) -> None:
    stager.place(parameters[part.target][part.target_start : part.target_start + tensor.shape[0]], tensor)


def _check_names(checkpoint: ScaledCheckpoint, spec: ModelSpec) -> None:
    expected = set(weight_names(spec))
    found = checkpoint.file_of
    missing = sorted(expected - found.keys())
    if missing:
        files = ", ".join(sorted(set(found.values())))
        raise WeightError(f"tensor {missing[0]!r} is not in {checkpoint.folder} ({files}); {len(missing)} missing")
    extra = sorted(name for name in found.keys() - expected if not _is_ignored(name, spec))
    if extra:
        raise WeightError(
            f"tensor {extra[0]!r} of {checkpoint.folder / found[extra[0]]} is not part of {spec.architecture} as "
            f"config.json describes it; {len(extra)} such"
        )


def _is_ignored(name: str, spec: ModelSpec) -> bool:
    """Old checkpoints store the rotary frequencies, tied ones the head a second time, and others one that is not to be
    used."""
    is_extra_head = name == "lm_head.weight" and (spec.tie_word_embeddings or not spec.has_lm_head)
    return name.endswith("rotary_emb.inv_freq") or is_extra_head


def _check_shape(checkpoint: ScaledCheckpoint, name: str, shape: tuple[int, ...]) -> None:
    found = checkpoint.shape(name)
    if found != shape:
        raise WeightError(
            f"tensor {name!r} of {checkpoint.folder / checkpoint.file_of[name]} has shape {list(found)}; "
            f"config.json makes it {list(shape)}"
        )
