"""How far results may be off, as a share of the expected tensor's largest value: the one table of tolerances."""

import torch
from torch import Tensor

# fmt: off
KERNEL = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Rounding errors of small models with large random weights add up over the layers.
LOGITS = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}
# The same weights and dtype, computed in another order or split over ranks.
SPLIT_LOGITS = {torch.float32: 1e-4, torch.bfloat16: 2e-1}
# fmt: on


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; infinite where shapes differ or a value is not finite."""
    if actual.shape != expected.shape or not bool(actual.isfinite().all()):
        return float("inf")
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max())
