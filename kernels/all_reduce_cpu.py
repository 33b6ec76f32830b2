"""Sums and gathers over the ranks of one host, through memory that they share.

Every rank owns a slot of two buffers and writes only there. A round is: copy a piece of the tensor to the buffer of
this round, arrive at the barrier, wait for the others, read all slots. Rounds alternate between the buffers, so one
barrier a round suffices: whoever writes a buffer again has waited for the round between, which the others entered only
when they had read the buffer's last contents.

Sums are taken in rank order in float32 and rounded once, by the same code on every rank: all get the same bits.
Every rank adds up everything. That each adds one part and then collects the others' (reduce-scatter and all-gather,
Thakur et al. 2005, section 4.5) would read less from four ranks on, for the price of a second barrier.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils

from manta.kernels.barrier_cpu import BARRIER_BYTES, arrive, wait
from manta.kernels.cpu_scalars import intrinsic, jit, load, load_int64, store, store_int64

PAGE_BYTES = 4096
_HEAD_BYTES = 128  # of each buffer: the round it was written in and the rank's call, int64 both
SCRATCH = 1024  # sums kept in float32 at a time: 4 KiB of the first-level cache
LATE = -2
_FLOAT32 = np.float32(0)
_BYTE = ir.IntType(8)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things lie in memory that is zero to begin with: the barrier, then per rank a slot of two buffers."""

    num_ranks: int
    piece_bytes: int  # what a buffer holds, a multiple of PAGE_BYTES

    @property
    def buffer_bytes(self) -> int:
        """Whole pages, head included: they lie near the rank that writes them first."""
        return self.piece_bytes + PAGE_BYTES

    @property
    def slots_at(self) -> int:
        return -(-BARRIER_BYTES // PAGE_BYTES) * PAGE_BYTES

    @property
    def slot_bytes(self) -> int:
        return 2 * self.buffer_bytes

    @property
    def total_bytes(self) -> int:
        return self.slots_at + self.num_ranks * self.slot_bytes

    def own_bytes(self, rank: int) -> range:
        """What the rank writes."""
        begin = self.slots_at + rank * self.slot_bytes
        return range(begin if rank else 0, begin + self.slot_bytes)


@intrinsic
def _copy(typing_context: Any, target: Any, source: Any, num_bytes: Any) -> Any:
    """memcpy by addresses."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, of = (builder.inttoptr(address, _BYTE.as_pointer()) for address in args[:2])
        cgutils.raw_memcpy(builder, to, of, args[2], 1)  # type: ignore[no-untyped-call]
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


# The kernels below share their first arguments: `memory`, the address of what a Layout describes, and the layout's
# slots_at, buffer_bytes and num_ranks; this rank; `turn`, the number of the round, which counts from 1 on all ranks.
# `call` stands for what the ranks are doing and must be the same on all of them.


@jit(forceinline=True)
def _head(memory: Any, slots_at: Any, buffer_bytes: Any, rank: Any, turn: Any) -> Any:
    """Address of the rank's buffer for this round."""
    return memory + slots_at + (2 * rank + (turn & 1)) * buffer_bytes


@jit()
def enter(
    memory: Any, slots_at: Any, buffer_bytes: Any, num_ranks: Any, rank: Any, turn: Any, call: Any,
    source: Any, num_bytes: Any,
) -> None:  # fmt: skip
    """Puts this rank's piece into its buffer and arrives."""
    head = _head(memory, slots_at, buffer_bytes, rank, turn)
    _copy(head + _HEAD_BYTES, source, num_bytes)
    store_int64(head, 0, turn)
    store_int64(head, 1, call)
    arrive(memory, num_ranks * turn)


@jit()
def absent_rank(memory: Any, slots_at: Any, buffer_bytes: Any, num_ranks: Any, rank: Any, turn: Any) -> Any:
    """The first rank that has not entered this round, or -1."""
    for other in range(num_ranks):
        if load_int64(_head(memory, slots_at, buffer_bytes, other, turn), 0) != turn:
            return other
    return -1


@jit()
def odd_rank(memory: Any, slots_at: Any, buffer_bytes: Any, num_ranks: Any, rank: Any, turn: Any, call: Any) -> Any:
    """The first rank that has entered this round with another call, or -1. Only behind `wait`."""
    for other in range(num_ranks):
        if load_int64(_head(memory, slots_at, buffer_bytes, other, turn), 1) != call:
            return other
    return -1


@jit(fastmath=False)
def sum_pieces(
    memory: Any, slots_at: Any, buffer_bytes: Any, num_ranks: Any, rank: Any, turn: Any,
    out: Any, count: Any, scratch: Any, kind: Any,
) -> None:  # fmt: skip
    """Sums `count` elements of all ranks' pieces to `out`. `scratch` holds SCRATCH float32 values."""
    first = _head(memory, slots_at, buffer_bytes, 0, turn) + _HEAD_BYTES
    stride = 2 * buffer_bytes
    if num_ranks == 2:
        for i in range(count):
            store(out, i, load(first, i, kind) + load(first + stride, i, kind), kind)
        return
    last = first + (num_ranks - 1) * stride
    for begin in range(0, count, SCRATCH):
        length = min(SCRATCH, count - begin)
        for i in range(length):
            store(scratch, i, load(first, begin + i, kind) + load(first + stride, begin + i, kind), _FLOAT32)
        for other in range(2, num_ranks - 1):
            piece = first + other * stride
            for i in range(length):
                store(scratch, i, load(scratch, i, _FLOAT32) + load(piece, begin + i, kind), _FLOAT32)
        for i in range(length):
            store(out, begin + i, load(scratch, i, _FLOAT32) + load(last, begin + i, kind), kind)


@jit()
def all_reduce(
    memory: Any, slots_at: Any, buffer_bytes: Any, num_ranks: Any, rank: Any, turn: Any, call: Any,
    spins: Any, x: Any, count: Any, width: Any, scratch: Any, kind: Any,
) -> Any:  # fmt: skip
    """A whole round at once: sums `count` elements of `width` bytes at x over the ranks, in place.

    Returns -1 when done; LATE if the others have not come within some 50 ms; the rank that does something else. In the
    last two cases x is as it was, this rank has arrived, and the steps behind `enter` remain.
    """
    enter(memory, slots_at, buffer_bytes, num_ranks, rank, turn, call, x, count * width)
    if not wait(memory, num_ranks * turn, spins):
        return LATE
    odd = odd_rank(memory, slots_at, buffer_bytes, num_ranks, rank, turn, call)
    if odd < 0:
        sum_pieces(memory, slots_at, buffer_bytes, num_ranks, rank, turn, x, count, scratch, kind)
    return odd


@jit()
def collect_rows(
    memory: Any, slots_at: Any, buffer_bytes: Any, num_ranks: Any, rank: Any, turn: Any,
    out: Any, row_bytes: Any, at: Any, num_bytes: Any,
) -> None:  # fmt: skip
    """Copies bytes at..at + num_bytes of every rank's matrix, rows of row_bytes, into `out`, whose rows hold the ranks'
    rows one behind the other."""
    for other in range(num_ranks):
        source = _head(memory, slots_at, buffer_bytes, other, turn) + _HEAD_BYTES
        done = 0
        while done < num_bytes:
            row, column = (at + done) // row_bytes, (at + done) % row_bytes
            length = min(row_bytes - column, num_bytes - done)
            _copy(out + (row * num_ranks + other) * row_bytes + column, source + done, length)
            done += length
