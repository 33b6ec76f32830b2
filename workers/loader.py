"""Finds a model folder and fills a rank's model from it."""

from pathlib import Path

import torch

from manta.configs.model import ModelSpec
from manta.workers.mesh import Mesh
from manta.workers.models.decoder import CausalLM


def resolve_model_folder(model: str) -> Path:
    """A local folder as it is, a hub id through the hub's cache. Raises WeightError if it cannot be had."""
    raise NotImplementedError


def load_model(
    folder: Path, spec: ModelSpec, mesh: Mesh, dtype: torch.dtype, *, load_format: str = "auto", seed: int = 0
) -> CausalLM:
    """The rank's part of the model, weights in place and prepacked. Raises WeightError naming tensor and file."""
    raise NotImplementedError
