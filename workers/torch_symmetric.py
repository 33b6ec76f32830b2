"""torch's symmetric memory (torch.distributed._symmetric_memory, alpha) as `symmetric.PeerMemory`."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from manta.workers.symmetric import Form

# torch tells devices apart by host and index, and every worker has its one GPU as index 0. With this torch does without
# multicast, too; it is set only where there is a single device to be seen.
_ALLOW_EQUAL_INDICES = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"


class TorchPeerMemory:
    """One buffer, which every all-reduce copies its values to; ranks are those of the NCCL backend `nccl`."""

    def __init__(self, name: str, store: Any, rank: int, num_ranks: int, nccl: Any, device: torch.device) -> None:
        """`name` must be this group's alone in the process, `store` this group's alone among the ranks."""
        self._name = name
        self._store = store
        self._rank = rank
        self._num_ranks = num_ranks
        self._nccl = nccl
        self._device = device
        self._buffer: Tensor | None = None
        self._handle: Any = None
        self._group: Any = None

    def allocate(self, num_bytes: int) -> None:
        """Raises RuntimeError where the device or the driver has no such memory."""
        if torch.cuda.device_count() == 1:
            os.environ.setdefault(_ALLOW_EQUAL_INDICES, "1")
        self._buffer = _c10d()._SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, self._device, None)

    def connect(self) -> None:
        """Raises RuntimeError where ranks do not reach each other's memory."""
        c10d = _c10d()
        # torch asks the group of this name who is in it. It is none of torch.distributed's own: nothing else finds it.
        self._group = c10d.ProcessGroup(self._store, self._rank, self._num_ranks)
        self._group._register_backend(self._device, c10d.ProcessGroup.BackendType.NCCL, self._nccl)
        c10d._register_process_group(self._name, self._group)
        self._handle = c10d._SymmetricMemory.rendezvous(self._buffer, self._name)
        torch.cuda.synchronize(self._device)

    def forms(self) -> Mapping[str, Form]:
        forms: dict[str, Form] = {"one_shot": self._one_shot, "two_shot": self._two_shot}
        if self._handle.multicast_ptr:
            forms["multimem"] = self._multimem
        return forms

    def _one_shot(self, x: Tensor) -> None:
        torch.ops.symm_mem.one_shot_all_reduce_out(self._filled(x), "sum", self._name, x.view(-1))

    def _two_shot(self, x: Tensor) -> None:
        values = self._filled(x)
        torch.ops.symm_mem.two_shot_all_reduce_(values, "sum", self._name)
        x.view(-1).copy_(values)

    def _multimem(self, x: Tensor) -> None:
        values = self._filled(x)
        torch.ops.symm_mem.multimem_all_reduce_(values, "sum", self._name)
        x.view(-1).copy_(values)

    def _filled(self, x: Tensor) -> Tensor:
        """The beginning of the buffer with x in it. What peers read of the call before they have read: every form ends
        with a barrier."""
        assert self._buffer is not None
        values = self._buffer[: x.nbytes].view(x.dtype)
        return values.copy_(x.view(-1))


def _c10d() -> Any:
    """Where torch has all this; versions differ in what is there."""
    from torch._C import _distributed_c10d

    return _distributed_c10d
