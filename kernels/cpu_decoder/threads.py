"""How the threads of a step wait for each other: atomics, a barrier, and sleep between steps.

Threads that compute one step meet several times a layer, so a barrier must cost less than a microsecond; between steps
they must not take the cores from the scheduler and the frontends of a small host. Hence: a short spin, then giving
way to others at a barrier, or sleeping on a futex between steps.
"""

import platform
import sys
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from manta.kernels.cpu_scalars import intrinsic, jit

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_IS_X86 = platform.machine() in ("x86_64", "AMD64")
_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0) if sys.platform == "linux" else 0
_FUTEX_WAIT_PRIVATE, _FUTEX_WAKE_PRIVATE = 128, 129

# A pause takes 20 to 50 ns: about 100 us between steps, a few microseconds at a barrier.
_IDLE_SPINS = 2000
_BARRIER_SPINS = 200

_syscall: Any = types.ExternalFunction("syscall", types.int64(*[types.int64] * 6))
_sched_yield: Any = types.ExternalFunction("sched_yield", types.int32())
_usleep: Any = types.ExternalFunction("usleep", types.int32(types.uint32))


@intrinsic
def atomic_add(typing_context: Any, address: Any, value: Any) -> Any:
    """Adds to the int64 at `address`; returns what it was. Orders all memory."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _I64.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_swap(typing_context: Any, address: Any, value: Any) -> Any:
    """Writes the int64 at `address`; returns what it was. Orders all memory."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("xchg", builder.inttoptr(args[0], _I64.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load(typing_context: Any, address: Any) -> Any:
    """The int64 at `address`; what its writer wrote before it is visible."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], _I64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def pause(typing_context: Any) -> Any:
    """Tells the core that this is a wait."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _IS_X86:
            function = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.globals.get("llvm.x86.sse2.pause")
                         or ir.Function(builder.module, function, "llvm.x86.sse2.pause"), [])  # fmt: skip
        return context.get_dummy_value()

    return types.void(), codegen


@jit()
def barrier(counter: Any, threads: Any) -> None:
    """Returns when all `threads` have called it as often as this one. counter: address of an int64 that only grows."""
    if threads == 1:
        return
    target = (atomic_add(counter, 1) // threads + 1) * threads
    spins = 0
    while atomic_load(counter) < target:
        pause()
        spins += 1
        if spins > _BARRIER_SPINS:
            _sched_yield()


@jit()
def sleep_until_changed(address: Any, seen: Any) -> Any:
    """Waits until the int64 at `address` is not `seen`; returns its value. The int64 behind it counts sleepers."""
    spins = 0
    while True:
        value = atomic_load(address)
        if value != seen:
            return value
        pause()
        spins += 1
        if spins > _IDLE_SPINS:
            if _FUTEX == 0:
                _usleep(50)
                continue
            atomic_add(address + 8, 1)
            # compares the low half, then sleeps: a change in between returns at once
            _syscall(_FUTEX, address, _FUTEX_WAIT_PRIVATE, seen & 0xFFFFFFFF, 0, 0)
            atomic_add(address + 8, -1)


@jit()
def change_and_wake(address: Any) -> None:
    """Adds 1 to the int64 at `address` and wakes those who sleep on it."""
    atomic_add(address, 1)
    if _FUTEX != 0 and atomic_load(address + 8) != 0:
        _syscall(_FUTEX, address, _FUTEX_WAKE_PRIVATE, 1 << 30, 0, 0)
