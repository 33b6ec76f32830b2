"""Gets memory for KV blocks from the operating system before steps write to it.

The KV cache of a CPU takes memory only as it fills. On bare metal a fresh page of 2 MiB costs about 0.2 ms, on virtual
machines whose host finds memory only then up to 5 ms, and a long prompt needs dozens of them. A worker with nothing to
do gets those that will be needed next.
"""

import numpy as np

from manta.kernels.cpu_decoder.memory import HUGE_PAGE_BYTES, populate
from manta.kernels.metadata import KVCache
from manta.protos.worker_pb2 import StepPlan

AHEAD_PAGES = 2  # of each tensor of the cache, beyond the highest block in use: blocks are given out in this order


class PagesAhead:
    """What one rank's KV cache has been given so far, and how far it should be. One thread calls it."""

    def __init__(self, kv_cache: KVCache) -> None:
        """Tensors [num_blocks, ...] of one size in the memory of a CPU."""
        tensors = [tensor for layer in kv_cache for tensor in layer]
        self._starts = [tensor.data_ptr() for tensor in tensors]
        self._size = tensors[0].nbytes if tensors else 0  # bytes, the same of all
        self._block_bytes = tensors[0][0].nbytes if tensors else 0
        self._populated = 0  # bytes of each tensor, and one page more of those before the next tensor
        self._next_tensor = 0
        self._num_used = 0  # blocks

    def note(self, plan: StepPlan) -> None:
        """Takes in which blocks a plan gives to sequences."""
        blocks = plan.grow[1::2]
        highest = max(blocks) if blocks else -1
        for add in plan.adds:
            highest = max(highest, int(np.frombuffer(add.blocks, "<u4").max(initial=0)))
        self._num_used = max(self._num_used, highest + 1)

    def advance(self) -> bool:
        """Gets one page; False if there is none to get."""
        if self._next_tensor == len(self._starts):
            self._next_tensor = 0
            self._populated += HUGE_PAGE_BYTES
        tensor = self._next_tensor
        wanted = min(self._size, self._num_used * self._block_bytes + AHEAD_PAGES * HUGE_PAGE_BYTES)
        if self._populated >= wanted:
            return False
        self._next_tensor += 1
        if not populate(self._starts[tensor] + self._populated, min(HUGE_PAGE_BYTES, self._size - self._populated)):
            self._size = 0  # the system does not offer it
        return True
