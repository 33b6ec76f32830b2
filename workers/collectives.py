"""What tensor-parallel ranks do together, and how process groups do it: gloo for CPU ranks, NCCL for CUDA ranks."""

import contextlib
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions

_NO_TAG = 0x7E57


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
    """Over one of torch's process groups. NCCL works in the current stream itself: there is no other to wait for, and a
    CUDA graph records it like any launch."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._sum, self._gather = AllreduceOptions(), AllgatherOptions()
        self._sum.asyncOp = self._gather.asyncOp = False

    def all_reduce(self, x: Tensor) -> None:
        whole = x.contiguous()  # gloo takes strided memory for what it is not
        _finish(self._group.allreduce([whole], self._sum))
        if whole is not x:
            x.copy_(whole)

    def all_gather_last_dim(self, x: Tensor) -> Tensor:
        num_ranks = self._group.size()
        parts = x.new_empty(num_ranks * x.numel())
        _finish(self._group._allgather_base(parts, x.reshape(-1), self._gather))
        return parts.view(num_ranks, *x.shape).movedim(0, -2).reshape(*x.shape[:-1], num_ranks * x.shape[-1])

    def destroy(self) -> None:
        if self._group is not None:  # a rank that could not join others leaves its group a second time
            end_group(self._group)
        self._group = None


def _finish(work: Any) -> None:
    """NCCL gives nothing to wait for where it works in the current stream; gloo does."""
    if work is not None:
        work.wait()


def end_group(group: Any) -> None:
    """Whatever is under way in the group fails, on any thread and on any rank."""
    if group.name() == "nccl":
        group.abort()  # its communicator would otherwise wait for the other ranks
        return
    # Gloo has no such call. But a receive that is late breaks all connections of its group: this one always is.
    with contextlib.suppress(RuntimeError):
        nobody_sends = group.recv([torch.empty(1)], (group.rank() + 1) % group.size(), _NO_TAG)
        nobody_sends.wait(timedelta(milliseconds=1))
