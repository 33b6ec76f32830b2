"""What CPU kernels are written with: tensors as addresses, elements of any dtype as float32.

A kernel takes `tensor.data_ptr()` and reads `load(address, index, kind)`, much as a Triton kernel does; turning a
tensor into a numpy array would cost more than most kernels of a decode step. `kind` is a numpy scalar whose type says
what the elements are (numpy has no bfloat16): KINDS[tensor.dtype].

Numba's cache of compiled kernels notices a change of the file a kernel is in, not of this one; delete `__pycache__`
after editing here.
"""

import logging
from collections.abc import Callable
from typing import Any, cast

import numba
import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import extending, njit, types
from numba.core import event as compiling

KINDS: dict[torch.dtype, Any] = {
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
    torch.float32: np.float32(0),
}

MIN_PARALLEL_WORK = 1 << 17  # multiply-adds, tens of microseconds: less is not worth waking threads for

# Reductions may be reordered and fused multiply-adds used; infinities and NaNs keep their meaning.
_FASTMATH = {"reassoc", "contract", "nsz", "arcp"}
_FLOAT, _HALF, _I16, _I32 = ir.FloatType(), ir.HalfType(), ir.IntType(16), ir.IntType(32)
_KIND_TYPES = (types.uint16, types.int16, types.float32)


logger = logging.getLogger(__name__)


class _TellsOnce(compiling.Listener):
    """Says why the first start on a machine takes half a minute, when there is something to compile."""

    def on_start(self, event: Any) -> None:
        compiling.unregister("numba:run_pass", self)  # type: ignore[no-untyped-call]
        logger.info("compiling kernels for this CPU; later starts find them on the disk")

    def on_end(self, event: Any) -> None:
        pass


compiling.register("numba:run_pass", _TellsOnce())  # type: ignore[no-untyped-call]


# numba's type stubs count the typing context among the caller's arguments
intrinsic = cast(Callable[[Callable[..., Any]], Any], extending.intrinsic)


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba.njit for kernels: releases the GIL, compiled once per machine where any cache folder can be written."""

    def decorate(function: Callable[..., Any]) -> Any:
        settings: dict[str, Any] = {"nogil": True, "fastmath": _FASTMATH, "error_model": "numpy", **options}
        try:
            return njit(cache=True, **settings)(function)
        except RuntimeError:  # numba: "no locator available"
            return njit(**settings)(function)

    return decorate


def kernel_address(function: Callable[..., Any], num_ints: int, num_floats: int, *kinds: Any) -> int:
    """Compiles function(int64 * num_ints, float64 * num_floats, kinds) by itself; `call` runs it by its address.

    Numba compiles whatever a kernel calls once more with the kernel. A large one would cost its compilation again in
    every caller of every caller.
    """
    signature = types.void(*[types.int64] * num_ints, *[types.float64] * num_floats, *map(numba.typeof, kinds))
    settings: dict[str, Any] = {"fastmath": _FASTMATH, "error_model": "numpy", "nopython": True}
    try:
        compiled = numba.cfunc(signature, cache=True, **settings)(function)
    except RuntimeError:  # numba: "no locator available"
        compiled = numba.cfunc(signature, **settings)(function)
    _compiled.append(compiled)
    return cast(int, compiled.address)


_compiled: list[Any] = []  # code lives as long as its function


@intrinsic
def call(typing_context: Any, address: Any, args: Any) -> Any:
    """Calls the kernel at `address` with the tuple `args`."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        parts = [builder.extract_value(values[1], index) for index in range(len(signature.args[1]))]
        function = ir.FunctionType(ir.VoidType(), [part.type for part in parts])
        builder.call(builder.inttoptr(values[0], function.as_pointer()), parts)
        return context.get_dummy_value()

    return types.void(types.int64, args), codegen


def num_chunks(work: int) -> int:
    """How many threads should share `work` multiply-adds; as many as torch uses, or one."""
    threads = min(torch.get_num_threads(), int(numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    if threads == 1 or work < MIN_PARALLEL_WORK:
        return 1
    numba.set_num_threads(threads)
    return threads


@intrinsic
def load(typing_context: Any, address: Any, index: Any, kind: Any) -> Any:
    """Element `index` of the tensor at `address` as float32."""
    if kind not in _KIND_TYPES:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_element(context, builder, signature, args, _storage(kind)))
        if kind == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(value, _I32), ir.Constant(_I32, 16)), _FLOAT)
        return builder.fpext(value, _FLOAT) if kind == types.int16 else value

    return types.float32(types.int64, types.int64, kind), codegen


@intrinsic
def store(typing_context: Any, address: Any, index: Any, value: Any, kind: Any) -> Any:
    """Writes float32 `value` to element `index` of the tensor at `address`, rounded to nearest even."""
    if kind not in _KIND_TYPES:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = args[2]
        if kind == types.uint16:
            bits = builder.bitcast(value, _I32)
            odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
            rounded = builder.add(builder.add(bits, ir.Constant(_I32, 0x7FFF)), odd)
            is_nan = builder.fcmp_unordered("uno", value, value)
            rounded = builder.select(is_nan, ir.Constant(_I32, 0x7FC00000), rounded)
            value = builder.trunc(builder.lshr(rounded, ir.Constant(_I32, 16)), _I16)
        elif kind == types.int16:
            value = builder.fptrunc(value, _HALF)
        builder.store(value, _element(context, builder, signature, args, _storage(kind)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, kind), codegen


@intrinsic
def load_int32(typing_context: Any, address: Any, index: Any) -> Any:
    """Element `index` of the int32 tensor at `address`, as int64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_element(context, builder, signature, args, _I32))
        return builder.sext(value, ir.IntType(64))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def load_int64(typing_context: Any, address: Any, index: Any) -> Any:
    """Element `index` of the int64 tensor at `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_element(context, builder, signature, args, ir.IntType(64)))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def store_int64(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
    """Writes element `index` of the int64 tensor at `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _element(context, builder, signature, args, ir.IntType(64)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def load_float64(typing_context: Any, address: Any, index: Any) -> Any:
    """Element `index` of the float64 tensor at `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_element(context, builder, signature, args, ir.DoubleType()))

    return types.float64(types.int64, types.int64), codegen


@intrinsic
def item_bytes(typing_context: Any, kind: Any) -> Any:
    """Bytes of an element, a constant to the compiler."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(ir.IntType(64), 4 if kind == types.float32 else 2)

    return types.int64(kind), codegen


@intrinsic
def is_paired(typing_context: Any, kind: Any) -> Any:
    """Whether tiles read the elements two rows at a time (bfloat16), a constant to the compiler."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(ir.IntType(1), kind == types.uint16)

    return types.boolean(kind), codegen


@intrinsic
def _power_of_two(typing_context: Any, exponent: Any) -> Any:
    """2 ** exponent as float32, for an int32 exponent in [-126, 127]."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        biased = builder.add(args[0], ir.Constant(_I32, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(_I32, 23)), _FLOAT)

    return types.float32(types.int32), codegen


@jit(forceinline=True)
def exp(x: Any) -> Any:
    """e ** x in float32, to about 2 ulp; clamped to [2 ** -126, 2 ** 126]. Unlike math.exp it can be vectorised.

    2 ** f on [-0.5, 0.5] is the Taylor series of e ** (f ln 2) up to the seventh power.
    """
    y = min(max(x * np.float32(1.4426950408889634), np.float32(-126.0)), np.float32(126.0))
    n = np.floor(y + np.float32(0.5))
    f = (y - n) * np.float32(0.6931471805599453)
    p = np.float32(1.0 / 5040)
    p = p * f + np.float32(1.0 / 720)
    p = p * f + np.float32(1.0 / 120)
    p = p * f + np.float32(1.0 / 24)
    p = p * f + np.float32(1.0 / 6)
    p = p * f + np.float32(0.5)
    p = p * f + np.float32(1.0)
    p = p * f + np.float32(1.0)
    return p * _power_of_two(np.int32(n))


def _storage(kind: Any) -> Any:
    return {types.uint16: _I16, types.int16: _HALF, types.float32: _FLOAT}[kind]


def _element(context: Any, builder: Any, signature: Any, args: Any, storage: Any) -> Any:
    return builder.gep(builder.inttoptr(args[0], storage.as_pointer()), [args[1]])
