"""Whole rows of float32 in vectors of 16 lanes: what softmax and SiLU need. Written out because compilers
prefer half as many lanes for loops like these."""

import math
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils as untyped_cgutils

from manta.kernels.cpu_scalars import intrinsic

cgutils: Any = untyped_cgutils
LANES = 16

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FLOAT = ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_I32, LANES)
_SHORTS = ir.VectorType(ir.IntType(16), LANES)
_UNDEFINED = ir.Constant(_FLOATS, ir.Undefined)


def _splat(value: float) -> Any:
    return ir.Constant(_FLOATS, [value] * LANES)


def _splat_int(value: int) -> Any:
    return ir.Constant(_INTS, [value] * LANES)


def _spread(builder: Any, value: Any) -> Any:
    """All lanes = value."""
    lane = builder.insert_element(_UNDEFINED, value, _I32(0))
    return builder.shuffle_vector(lane, _UNDEFINED, ir.Constant(_INTS, [0] * LANES))


def _across(builder: Any, vector: Any, combine: Any) -> Any:
    """The lanes combined into one value, halves against each other."""
    for width in (8, 4, 2, 1):
        mask = ir.Constant(_INTS, [(lane + width) % LANES for lane in range(LANES)])
        vector = combine(vector, builder.shuffle_vector(vector, _UNDEFINED, mask))
    return builder.extract_element(vector, _I32(0))


def _rounded(builder: Any, vector: Any) -> Any:
    """A vector of finite float32 as bfloat16, to the nearest, ties to even."""
    bits = builder.bitcast(vector, _INTS)
    odd = builder.and_(builder.lshr(bits, _splat_int(16)), _splat_int(1))
    bits = builder.add(builder.add(bits, _splat_int(0x7FFF)), odd)
    return builder.trunc(builder.lshr(bits, _splat_int(16)), _SHORTS)


@intrinsic
def greatest(typing_context: Any, address: Any, num_vectors: Any) -> Any:
    """The greatest of num_vectors * 16 float32 at `address`; NaNs are passed over."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def larger(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", b, a), b, a)

        pointer = builder.inttoptr(args[0], _FLOATS.as_pointer())
        best = cgutils.alloca_once_value(builder, _splat(-math.inf))
        with cgutils.for_range(builder, args[1]) as loop:
            value = builder.load(builder.gep(pointer, [loop.index]), align=4)
            builder.store(larger(builder.load(best), value), best)
        return _across(builder, builder.load(best), larger)

    return types.float32(types.int64, types.int64), codegen


# 2 ** f for f in [-0.5, 0.5] to 1.7e-7 in float32, the least relative error with exactly 1 at 0
_POWERS = (1.0, 0.6931469776, 0.2402224208, 0.0555073374, 0.0096715128, 0.0013264727)
_ROUNDER = 1.5 * 2**23  # a sum with it has no bits below the point, and the integer in its lowest bits


def exp2(builder: Any, y: Any) -> Any:
    """2 ** y of a vector, to about 2e-7; y is taken as no less than -126. At most 127.

    2 ** n, by its bits, times 2 ** f for f in [-0.5, 0.5] by a polynomial.
    """
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), "llvm.fma.v16f32")
    y = builder.select(builder.fcmp_unordered(">", y, _splat(-126.0)), y, _splat(-126.0))  # keeps NaN
    exact = ("arcp",)  # instructions without any flag get all that numba was told, and these must not be reordered
    shifted = builder.fadd(y, _splat(_ROUNDER), flags=exact)
    f = builder.fsub(y, builder.fsub(shifted, _splat(_ROUNDER), flags=exact), flags=exact)
    p = _splat(_POWERS[-1])
    for coefficient in reversed(_POWERS[:-1]):
        p = builder.call(fma, [p, f, _splat(coefficient)])
    exponent = builder.shl(builder.bitcast(shifted, _INTS), ir.Constant(_INTS, [23] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(p, _INTS), exponent), _FLOATS)


@intrinsic
def exp_row(typing_context: Any, address: Any, num_vectors: Any, highest: Any, out: Any, kind: Any) -> Any:
    """e ** (x - highest) for each of num_vectors * 16 float32 at `address`, written to `out` (which may be the same) as
    float32 or, rounded, as bfloat16; returns their sum before rounding."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _FLOATS.as_pointer())
        top = _spread(builder, args[2])
        total = cgutils.alloca_once_value(builder, _splat(0.0))
        with cgutils.for_range(builder, args[1]) as loop:
            place = builder.gep(pointer, [loop.index])
            y = builder.fmul(builder.fsub(builder.load(place, align=4), top), _splat(math.log2(math.e)))
            weight = exp2(builder, y)
            if kind == types.uint16:
                written, vector = _rounded(builder, weight), _SHORTS
            else:
                written, vector = weight, _FLOATS
            target = builder.gep(builder.inttoptr(args[3], vector.as_pointer()), [loop.index])
            builder.store(written, target, align=2)
            builder.store(builder.fadd(builder.load(total), weight), total)
        return _across(builder, builder.load(total), builder.fadd)

    return types.float32(types.int64, types.int64, types.float32, types.int64, kind), codegen


@intrinsic
def silu_mul_row(typing_context: Any, gate: Any, up: Any) -> Any:
    """16 float32 at address `gate` = up * gate / (1 + e ** -gate), up being those at address `up`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place, others = (builder.inttoptr(address, _FLOATS.as_pointer()) for address in args)
        gate, up = builder.load(place, align=4), builder.load(others, align=4)
        y = builder.fmul(gate, _splat(-math.log2(math.e)))
        y = builder.select(builder.fcmp_unordered("<", y, _splat(126.0)), y, _splat(126.0))  # keeps NaN
        below = builder.fadd(exp2(builder, y), _splat(1.0))
        builder.store(builder.fdiv(builder.fmul(up, gate), below), place, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def copy_past_caches(typing_context: Any, source: Any, target: Any, num_vectors: Any) -> Any:
    """num_vectors * 16 float32 from address `source` to `target`, a multiple of 64, which is not read first: for what
    is larger than the caches and is written in whole lines. Visible to other threads after an atomic operation."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = (builder.inttoptr(address, _FLOATS.as_pointer()) for address in args[:2])
        with cgutils.for_range(builder, args[2]) as loop:
            value = builder.load(builder.gep(source, [loop.index]), align=4)
            written = builder.store(value, builder.gep(target, [loop.index]), align=4 * LANES)
            written.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def shrink_rows(typing_context: Any, before: Any, now: Any, factor: Any, num_vectors: Any) -> Any:
    """factor = e ** (before - now), then before = now; all of them addresses of num_vectors * 16 float32. A maximum
    that was never set is -1e30 or so, and its factor about 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointers = [builder.inttoptr(address, _FLOATS.as_pointer()) for address in args[:3]]
        with cgutils.for_range(builder, args[3]) as loop:
            places = [builder.gep(pointer, [loop.index]) for pointer in pointers]
            old, new = (builder.load(place, align=4) for place in places[:2])
            y = builder.fmul(builder.fsub(old, new), _splat(math.log2(math.e)))
            builder.store(exp2(builder, y), places[2], align=4)
            builder.store(new, places[0], align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen
