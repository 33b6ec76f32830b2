"""What tensor-parallel ranks do together, and how process groups do it: gloo for CPU ranks, NCCL for CUDA ranks."""

from typing import Any, Protocol

import torch
from torch import Tensor


class MeshError(RuntimeError):
    """Ranks could not join or lost each other; the message names the rank and the reason."""


class Collectives(Protocol):
    """Calls that all ranks make in the same order, with tensors of the same shape and dtype."""

    def all_reduce(self, x: Tensor) -> None:
        """Sums x over the ranks in place."""
        ...

    def all_gather_last_dim(self, x: Tensor) -> Tensor:
        """[..., n] of each rank -> [..., num_ranks * n] on all of them, in rank order."""
        ...

    def destroy(self) -> None:
        """Leaves the others, whose calls under way fail."""
        ...


class ProcessGroupCollectives:
    """Over one of torch's process groups."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def all_reduce(self, x: Tensor) -> None:
        self._group.allreduce([x]).wait()

    def all_gather_last_dim(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self._group.size())]
        self._group.allgather([parts], [x.contiguous()]).wait()
        return torch.cat(parts, dim=-1)

    def destroy(self) -> None:
        end_group(self._group)
        self._group = None


def end_group(group: Any) -> None:
    """Call when nothing more is sent through the group; gloo's ends when it is forgotten."""
    if group.name() == "nccl":
        group.abort()  # its communicator would otherwise wait for the other ranks
