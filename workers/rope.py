"""The angles of rotary position embedding, with the scalings Manta serves."""

import math

import torch
from torch import Tensor

from manta.configs.model import RopeSpec


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> Tensor:
    """float32 [head_dim / 2]: radians per position of each pair of dimensions."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (spec.theta**exponents)
    if spec.kind == "linear":
        return frequencies / spec.factor
    if spec.kind == "llama3":
        return _llama3(frequencies, spec)
    return frequencies


def rope_table(spec: RopeSpec, head_dim: int, max_position: int) -> Tensor:
    """float32 [max_position, head_dim]: for each position the cosines of all pairs, then the sines."""
    positions = torch.arange(max_position, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(spec, head_dim))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _llama3(frequencies: Tensor, spec: RopeSpec) -> Tensor:
    """Scaling of the Llama 3.1 release: long wavelengths are stretched by `factor`, short ones kept.

    Wavelengths from original_max_position / high_freq_factor to original_max_position / low_freq_factor are blended.
    """
    wavelengths = 2 * math.pi / frequencies
    turns = spec.original_max_position / wavelengths  # full turns within the original context
    kept_share = ((turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)).clamp(0.0, 1.0)
    return (1 - kept_share) * frequencies / spec.factor + kept_share * frequencies
