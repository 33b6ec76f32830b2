"""Starts a kernel that reads what it is to do from a table, whose first field (8 bytes) is the kernel's own address."""

from typing import Any

from numba import int64, prange

from manta.kernels.cpu_scalars import call, jit, load_int64


@jit()
def run_alone(table: Any) -> None:
    """On the thread that calls."""
    call(load_int64(table, 0), (table, 0, 1))


@jit(parallel=True)
def run_together(table: Any, threads: Any) -> None:
    """Where no team runs, as on CPUs whose models run through oneDNN."""
    for thread in prange(threads):
        call(load_int64(table, 0), (table, int64(thread), int64(threads)))
