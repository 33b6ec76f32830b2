"""Host columns on their way to the device."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(columns: Sequence[NDArray[np.generic]], device: torch.device) -> list[Tensor]:
    """Arrays of one dtype -> tensors of the same shapes on the device, without waiting for it.

    On the CPU a tensor shares its array's memory. To a GPU they travel as one copy from pinned memory, since each copy
    costs a launch; torch's pinned allocator keeps that memory until the copy is over.
    """
    if device.type == "cpu":
        return [torch.from_numpy(np.require(column, requirements=["C", "W"])) for column in columns]
    flat = torch.from_numpy(np.concatenate([column.reshape(-1) for column in columns]))
    parts = torch.split(flat.pin_memory().to(device, non_blocking=True), [column.size for column in columns])
    return [part.view(column.shape) for part, column in zip(parts, columns, strict=True)]


def download(x: Tensor) -> Tensor:
    """The tensor in host memory. From a GPU the copy is only launched: its contents are there when the step is over."""
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
