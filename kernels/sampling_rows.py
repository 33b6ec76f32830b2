"""How each row of a step chooses its token, as the GPU's sampling kernels read it."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manta.kernels.sampling_parameters import Parameters

FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
INTS = ("slot", "position", "seed", "top_k", "num_prompt_tokens", "min_tokens")


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Two tensors, so that a step's rows travel as two copies; a CUDA graph keeps them and reads new values. A slot
    below 0 marks a row that is not there: its token is 0."""

    floats: Tensor  # float32 [len(FLOATS), N]
    ints: Tensor  # int64 [len(INTS) + W, N]: then W stop token ids, padded with -1; the seed's bits as they are

    @property
    def num_stop_tokens(self) -> int:
        return int(self.ints.shape[0]) - len(INTS)

    @classmethod
    def of(
        cls, slots: NDArray[np.int64], positions: NDArray[np.int64], parameters: Parameters, device: torch.device
    ) -> Self:
        """Rows that choose the tokens at positions [N] of slots [N], on their way to the device; does not wait."""
        p: Any = parameters
        floats = np.stack([getattr(p, name)[slots] for name in FLOATS])
        own = {"slot": slots, "position": positions, "seed": p.seed[slots].view(np.int64)}
        columns = [own[name] if name in own else getattr(p, name)[slots] for name in INTS]
        ints = np.concatenate([np.stack(columns), p.stop_token_ids[slots].T])
        return cls(*(_uploaded(torch.from_numpy(array), device) for array in (floats, np.ascontiguousarray(ints))))


def _uploaded(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
