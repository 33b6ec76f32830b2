"""What the kernels for GPUs ask of the device they run on."""

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True, slots=True)
class Gpu:
    """capability: 10 * major + minor of the compute capability; num_sms: multiprocessors."""

    capability: int
    num_sms: int

    @property
    def converts_e4m3(self) -> bool:
        return self.capability >= 89


STAND_IN = Gpu(90, 132)  # H200
_stand_in = STAND_IN


def pretend(gpu: Gpu) -> None:
    """Tensors that are on no GPU, to be interpreted or compiled for, are from now on taken to be on this one."""
    global _stand_in
    _stand_in = gpu


@lru_cache(maxsize=64)
def _properties(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    return Gpu(10 * properties.major + properties.minor, properties.multi_processor_count)


def gpu_of(device: torch.device) -> Gpu:
    return _properties(device) if device.type == "cuda" else _stand_in
