"""Random weights, for measurements without a checkpoint."""

import zlib

import torch
from torch import Tensor


def random_weight(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: torch.device) -> Tensor:
    """The whole checkpoint tensor `name`, made on the device: norms are ones, biases zeros, matrices normal with
    variance 1 / inputs.

    Depends on the seed and the name alone, so that every rank cuts its part from the same values; devices of another
    kind draw others.
    """
    if len(shape) == 1:
        return torch.full(shape, 1.0 if name.endswith("norm.weight") else 0.0, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(seed ^ zlib.crc32(name.encode()))
    return torch.randn(shape, dtype=dtype, generator=generator, device=device).mul_(shape[1] ** -0.5)
