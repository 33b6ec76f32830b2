"""All-reduce and all-gather of the ranks of one host, through memory that they share.

Gloo takes 0.3 ms for what this does in a few microseconds, and 4 ms where there are more ranks than cores
(`bench/all_reduce.py`).
"""

import logging
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manta.kernels import all_reduce_cpu as kernels
from manta.kernels import barrier_cpu
from manta.kernels.all_reduce_cpu import LATE, SCRATCH, Layout
from manta.kernels.cpu_scalars import KINDS
from manta.workers.collectives import Collectives, MeshError
from manta.workers.host_cores import num_cores
from manta.workers.shared_memory import NotSharedError, SharedMemory, share_memory

logger = logging.getLogger(__name__)

PIECE_BYTES = 512 * 1024  # of a tensor at a time
SPIN_US = 15.0  # before a rank that waits sleeps
CROWDED_SPIN_US = 2.0  # where another rank needs the core


def connect(
    store: Any, *, rank: int, num_ranks: int, num_ranks_on_host: int, timeout_s: float, otherwise: Collectives
) -> Collectives:
    """Collectives through shared memory, or `otherwise` with a line in rank 0's log that says why.

    A call on all ranks alike; `store` is for this group alone.
    """
    layout = Layout(num_ranks, PIECE_BYTES)
    try:
        memory = share_memory(store, rank, num_ranks, layout.total_bytes, layout.own_bytes(rank))
    except NotSharedError as error:
        if rank == 0:
            logger.warning("%d tensor-parallel ranks talk through gloo, which is slower: %s", num_ranks, error)
        return otherwise
    if rank == 0:
        megabytes = layout.total_bytes / 2**20
        logger.info("%d tensor-parallel ranks talk through %.1f MiB of shared memory", num_ranks, megabytes)
    is_crowded = num_cores() < num_ranks_on_host
    return HostCollectives(memory, layout, rank, timeout_s, CROWDED_SPIN_US if is_crowded else SPIN_US, otherwise)


class _Item(NamedTuple):
    """A dtype as kernels see it."""

    kind: Any
    num_bytes: int
    code: int  # 1 to 7; 0 stands for a gather


class HostCollectives:
    """One rank's view of the shared memory. One thread calls it at a time; any may call `destroy`.

    The owner of the round number, which all ranks count alike. Once a call has failed all further ones do, and the
    other ranks' too: rounds could no longer be told apart.
    """

    def __init__(
        self,
        memory: SharedMemory,
        layout: Layout,
        rank: int,
        timeout_s: float,
        spin_us: float,
        otherwise: Collectives,
    ) -> None:
        self._memory = memory
        self._barrier = memory.address
        self._layout = layout
        self._place = (memory.address, layout.slots_at, layout.buffer_bytes, layout.num_ranks, rank)
        self._rank = rank
        self._num_ranks = layout.num_ranks
        self._timeout_s = timeout_s
        self._spins = round(spin_us * barrier_cpu.spins_per_us(memory.address))
        self._scratch = torch.empty(SCRATCH, dtype=torch.float32)
        self._scratch_address = self._scratch.data_ptr()
        self._otherwise = otherwise  # takes dtypes that no kernel sums
        self._items: dict[torch.dtype, _Item] = {}
        self._turn = 0
        self._failure = ""

    def all_reduce(self, x: Tensor) -> None:
        item = self._items.get(x.dtype) or self._prepare(x.dtype)
        if item is None:
            self._otherwise.all_reduce(x)
        elif not x.is_contiguous():
            whole = x.contiguous()
            self.all_reduce(whole)
            x.copy_(whole)
        else:
            count, address = x.numel(), x.data_ptr()
            step = self._layout.piece_bytes // item.num_bytes
            for begin in range(0, count, step):
                self._reduce(address + begin * item.num_bytes, min(step, count - begin), item, count << 3 | item.code)

    def all_gather_last_dim(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self._num_ranks * x.shape[-1])
        num_bytes, row_bytes = x.numel() * x.itemsize, x.shape[-1] * x.itemsize
        for at in range(0, num_bytes, self._layout.piece_bytes):
            length = min(self._layout.piece_bytes, num_bytes - at)
            turn = self._meet(num_bytes << 3, x.data_ptr() + at, length)
            kernels.collect_rows(*self._place, turn, out.data_ptr(), row_bytes, at, length)
        return out

    def destroy(self) -> None:
        self._fail(f"tp rank {self._rank} has left its group")
        self._otherwise.destroy()

    def _prepare(self, dtype: torch.dtype) -> _Item | None:
        """Runs every kernel once on all ranks, so that none is compiled while a request waits for it. None if the
        kernels do not know the dtype."""
        if dtype not in KINDS:
            return None
        item = self._items[dtype] = _Item(KINDS[dtype], dtype.itemsize, 1 + list(KINDS).index(dtype))
        x = torch.zeros(1, dtype=dtype)
        self._reduce(x.data_ptr(), 1, item, 0)
        self.all_gather_last_dim(x)
        return item

    def _reduce(self, address: int, count: int, item: _Item, call: int) -> None:
        """Sums a piece in one round."""
        turn = self._begin_turn()
        odd = kernels.all_reduce(
            *self._place, turn, call, self._spins, address, count, item.num_bytes, self._scratch_address, item.kind
        )
        if odd != -1:
            if odd == LATE:
                self._wait()
            self._check_calls(call)
            kernels.sum_pieces(*self._place, turn, address, count, self._scratch_address, item.kind)

    def _meet(self, call: int, address: int, num_bytes: int) -> int:
        """A round up to the point where all pieces can be read; returns its number."""
        turn = self._begin_turn()
        kernels.enter(*self._place, turn, call, address, num_bytes)
        if not barrier_cpu.wait(self._barrier, self._num_ranks * turn, self._spins):
            self._wait()
        self._check_calls(call)
        return turn

    def _begin_turn(self) -> int:
        if self._failure:
            raise MeshError(self._failure)
        self._turn += 1
        return self._turn

    def _wait(self) -> None:
        """Waits for ranks that are late, as long as they may still come. Raises MeshError."""
        deadline_s = time.monotonic() + self._timeout_s
        while not barrier_cpu.wait(self._barrier, self._num_ranks * self._turn, 0):
            ended = [rank for rank, process in enumerate(self._memory.processes) if process.has_ended()]
            left = barrier_cpu.closed_by(self._barrier)
            if ended:
                self._fail(f"tp rank {ended[0]} (process {self._memory.processes[ended[0]].pid}) has ended")
            elif left >= 0:
                self._fail(f"tp rank {left} has left the group")
            elif time.monotonic() > deadline_s:
                missing = kernels.absent_rank(*self._place, self._turn)
                self._fail(f"tp rank {missing} did not come to a collective within {self._timeout_s:g} s")
            else:
                continue
            raise MeshError(self._failure)

    def _check_calls(self, call: int) -> None:
        odd = kernels.odd_rank(*self._place, self._turn, call)
        if odd >= 0:
            self._fail(f"tp rank {odd} is in another collective than tp rank {self._rank}, or with another shape")
            raise MeshError(self._failure)

    def _fail(self, reason: str) -> None:
        self._failure = self._failure or reason
        barrier_cpu.close(self._barrier, self._rank)
