"""A barrier between processes that share memory: a counter that every rank raises, spun on and then slept on.

A rank that waits spins for some microseconds, which is what balanced ranks need, and then sleeps on a Linux futex, so
that others can have its core; it does not give way by sched_yield, which beside a busy program costs that program's
whole time slice, 3 ms. The last rank to arrive wakes the sleepers; without any it makes no system call.

The counter is raised and read by sequentially consistent atomics: what a rank wrote before it arrived is seen by all
that have waited for it, on x86 and on ARM. Of "the last rank looks for sleepers" and "the sleeper looks at the counter"
one sees the other (Dekker's argument; futex(2) compares once more inside the kernel).
"""

import platform
import sys
import time
from typing import Any

from numba import types

from manta.kernels.cpu_decoder.threads import atomic_add, atomic_load, atomic_swap, pause
from manta.kernels.cpu_scalars import jit, store_int64

# Offsets in bytes from the barrier's address, a pair of cache lines each (processors fetch them in pairs); int64, zero
# to begin with.
_COUNTER = 0  # arrivals since the beginning; the lower half is the futex
_SLEEPERS = 128  # ranks that may be asleep
_CLOSED = 256  # 0, or 1 + the rank that left first
_TIMESPEC = 384  # how long a rank sleeps at a time: seconds, nanoseconds
BARRIER_BYTES = 512

_FUTEX_CALLS = {"x86_64": 202, "aarch64": 98}  # the number of the system call; both machines are little-endian
_FUTEX = _FUTEX_CALLS.get(platform.machine(), -1)
_FUTEX_WAIT, _FUTEX_WAKE, _ALL = 0, 1, 0x7FFFFFFF
_SLEEP_NS = 50_000_000
_FAR = 1 << 62
_TRIAL_SPINS = 2000

_syscall: Any = types.ExternalFunction("syscall", types.int64(*[types.int64] * 5))


def unsupported_reason() -> str:
    """Why ranks cannot wait for each other this way on this machine; empty if they can."""
    if sys.platform != "linux":
        return f"futexes are Linux's, and this is {sys.platform}"
    if _FUTEX < 0:
        return f"the number of the futex call is not known for {platform.machine()}"
    return ""


@jit()
def arrive(address: Any, target: Any) -> None:
    """Raises the counter, and wakes the others if it thereby reaches `target`: num_ranks times the round's number."""
    if atomic_add(address + _COUNTER, 1) + 1 == target and atomic_load(address + _SLEEPERS) != 0:
        _syscall(_FUTEX, address + _COUNTER, _FUTEX_WAKE, _ALL, 0)


@jit()
def _spin(address: Any, target: Any, spins: Any) -> Any:
    for _ in range(spins):
        if atomic_load(address + _COUNTER) >= target:
            return True
        pause()
    return False


@jit()
def wait(address: Any, target: Any, spins: Any) -> Any:
    """True once the counter has reached `target`, after spinning `spins` times and sleeping for up to 50 ms; False if
    it has not by then, or if a rank has closed the barrier. A rank calls it again after False."""
    if _spin(address, target, spins):
        return True
    store_int64(address + _TIMESPEC, 1, _SLEEP_NS)
    atomic_add(address + _SLEEPERS, 1)
    seen = atomic_load(address + _COUNTER)
    while seen < target and atomic_load(address + _CLOSED) == 0:
        _syscall(_FUTEX, address + _COUNTER, _FUTEX_WAIT, seen & 0xFFFFFFFF, address + _TIMESPEC)
        before, seen = seen, atomic_load(address + _COUNTER)
        if seen == before:
            break  # nobody has arrived: the time is over
    atomic_add(address + _SLEEPERS, -1)
    return atomic_load(address + _COUNTER) >= target


@jit()
def close(address: Any, rank: Any) -> None:
    """Marks the barrier as left by `rank`, unless another one has left, and wakes whoever sleeps on it."""
    if atomic_load(address + _CLOSED) == 0:
        atomic_swap(address + _CLOSED, rank + 1)
    _syscall(_FUTEX, address + _COUNTER, _FUTEX_WAKE, _ALL, 0)


@jit()
def closed_by(address: Any) -> Any:
    """The rank that left first, or -1."""
    return atomic_load(address + _CLOSED) - 1


def spins_per_us(address: int) -> float:
    """How often `wait` looks at the counter in a microsecond; measured, for a pause lasts 5 to 50 ns."""
    _spin(address, _FAR, 1)
    shortest_ns = _TRIAL_SPINS * 1000
    for _ in range(5):
        begin_ns = time.perf_counter_ns()
        _spin(address, _FAR, _TRIAL_SPINS)
        shortest_ns = min(shortest_ns, time.perf_counter_ns() - begin_ns)
    return _TRIAL_SPINS / shortest_ns * 1e3
