"""Passes over rows of float32 in vectors of 16 lanes that choosing a token is made of: see `sample_cpu`.

Arrays are addresses and lengths in vectors. Sums are float64, in an order that depends on the array alone.
"""

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils as untyped_cgutils

from manta.kernels.cpu_decoder.vectors import LANES, exp2
from manta.kernels.cpu_scalars import intrinsic

cgutils: Any = untyped_cgutils
_untyped: Any = types
_PAIR = _untyped.UniTuple(types.float64, 2)
BLOCK_VECTORS = 4
BLOCK = BLOCK_VECTORS * LANES  # elements that share a maximum

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_FLOAT, _DOUBLE = ir.FloatType(), ir.DoubleType()
_FLOATS, _DOUBLES = ir.VectorType(_FLOAT, LANES), ir.VectorType(_DOUBLE, LANES)
_MASK = ir.VectorType(ir.IntType(1), LANES)
_ZEROS = ir.Constant(_FLOATS, [0.0] * LANES)


def _spread(builder: Any, value: Any) -> Any:
    """All lanes = value."""
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    lane = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(lane, undefined, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


def _across(builder: Any, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """The lanes combined into one value, halves against each other."""
    undefined = ir.Constant(vector.type, ir.Undefined)
    for width in (8, 4, 2, 1):
        lanes = [(lane + width) % LANES for lane in range(LANES)]
        other = builder.shuffle_vector(vector, undefined, ir.Constant(ir.VectorType(_I32, LANES), lanes))
        vector = combine(vector, other)
    return builder.extract_element(vector, _I32(0))


def _floats_at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _FLOATS.as_pointer())


def _load(builder: Any, pointer: Any, index: Any) -> Any:
    return builder.load(builder.gep(pointer, [index]), align=4)


@intrinsic
def maxima(typing_context: Any, address: Any, num_blocks: Any, out: Any) -> Any:
    """Writes the maximum of each BLOCK of floats at `address` to the floats at `out`; returns the greatest of them, or
    NaN if there is any NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def larger(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", b, a), b, a)

        pointer = _floats_at(builder, args[0])
        target = builder.inttoptr(args[2], _FLOAT.as_pointer())
        best = cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, [-math.inf] * LANES))
        odd = cgutils.alloca_once_value(builder, ir.Constant(_MASK, [0] * LANES))
        with cgutils.for_range(builder, args[1]) as loop:
            first = builder.mul(loop.index, _I64(BLOCK_VECTORS))
            vectors = [_load(builder, pointer, builder.add(first, _I64(i))) for i in range(BLOCK_VECTORS)]
            highest, is_odd = ir.Constant(_FLOATS, [-math.inf] * LANES), builder.load(odd)
            for vector in vectors:
                highest = larger(highest, vector)
                is_odd = builder.or_(is_odd, builder.fcmp_unordered("uno", vector, vector))
            builder.store(is_odd, odd)
            builder.store(_across(builder, highest, larger), builder.gep(target, [loop.index]))
            builder.store(larger(builder.load(best), highest), best)
        is_nan = builder.icmp_unsigned("!=", builder.bitcast(builder.load(odd), _I16), _I16(0))
        return builder.select(is_nan, ir.Constant(_FLOAT, math.nan), _across(builder, builder.load(best), larger))

    return types.float32(types.int64, types.int64, types.int64), codegen


@intrinsic
def weigh(typing_context: Any, address: Any, num_vectors: Any, top: Any, scale: Any, out: Any) -> Any:
    """Writes 2 ** ((x - top) * scale) of the floats at `address` to `out` (which may be the same), 0 where that is
    below 2 ** -126; returns their sum."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, target = _floats_at(builder, args[0]), _floats_at(builder, args[4])
        top, scale = _spread(builder, args[2]), _spread(builder, args[3])
        total = cgutils.alloca_once_value(builder, ir.Constant(_DOUBLES, [0.0] * LANES))
        with cgutils.for_range(builder, args[1]) as loop:
            y = builder.fmul(builder.fsub(_load(builder, pointer, loop.index), top), scale)
            is_normal = builder.fcmp_ordered(">=", y, ir.Constant(_FLOATS, [-126.0] * LANES))
            weight = builder.select(is_normal, exp2(builder, y), _ZEROS)
            builder.store(weight, builder.gep(target, [loop.index]), align=4)
            builder.store(builder.fadd(builder.load(total), builder.fpext(weight, _DOUBLES)), total)
        return _across(builder, builder.load(total), builder.fadd)

    return types.float64(types.int64, types.int64, types.float32, types.float32, types.int64), codegen


@intrinsic
def sum_from(typing_context: Any, address: Any, num_vectors: Any, lowest: Any) -> Any:
    """The sum of the floats at `address` that are `lowest` or more."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, lowest = _floats_at(builder, args[0]), _spread(builder, args[2])
        total = cgutils.alloca_once_value(builder, ir.Constant(_DOUBLES, [0.0] * LANES))
        with cgutils.for_range(builder, args[1]) as loop:
            value = _load(builder, pointer, loop.index)
            kept = builder.select(builder.fcmp_ordered(">=", value, lowest), value, _ZEROS)
            builder.store(builder.fadd(builder.load(total), builder.fpext(kept, _DOUBLES)), total)
        return _across(builder, builder.load(total), builder.fadd)

    return types.float64(types.int64, types.int64, types.float32), codegen


@intrinsic
def mass_from(typing_context: Any, address: Any, num_vectors: Any, lowest: Any) -> Any:
    """The sum of the floats at `address` that are `lowest` or more, and how many they are (float64 too)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        ints = ir.VectorType(_I32, LANES)
        pointer, lowest = _floats_at(builder, args[0]), _spread(builder, args[2])
        total = cgutils.alloca_once_value(builder, ir.Constant(_DOUBLES, [0.0] * LANES))
        count = cgutils.alloca_once_value(builder, ir.Constant(ints, [0] * LANES))
        with cgutils.for_range(builder, args[1]) as loop:
            value = _load(builder, pointer, loop.index)
            is_kept = builder.fcmp_ordered(">=", value, lowest)
            kept = builder.fpext(builder.select(is_kept, value, _ZEROS), _DOUBLES)
            builder.store(builder.fadd(builder.load(total), kept), total)
            builder.store(builder.add(builder.load(count), builder.zext(is_kept, ints)), count)
        parts = (
            _across(builder, builder.load(total), builder.fadd),
            builder.uitofp(_across(builder, builder.load(count), builder.add), _DOUBLE),
        )
        return context.make_tuple(builder, signature.return_type, parts)

    return _PAIR(types.int64, types.int64, types.float32), codegen


@intrinsic
def count_from(typing_context: Any, address: Any, num_vectors: Any, lowest: Any) -> Any:
    """How many of the floats at `address` are `lowest` or more."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        ints = ir.VectorType(_I32, LANES)
        pointer, lowest = _floats_at(builder, args[0]), _spread(builder, args[2])
        total = cgutils.alloca_once_value(builder, ir.Constant(ints, [0] * LANES))
        with cgutils.for_range(builder, args[1]) as loop:
            is_kept = builder.fcmp_ordered(">=", _load(builder, pointer, loop.index), lowest)
            builder.store(builder.add(builder.load(total), builder.zext(is_kept, ints)), total)
        return builder.zext(_across(builder, builder.load(total), builder.add), _I64)

    return types.int64(types.int64, types.int64, types.float32), codegen


@intrinsic
def any_within(typing_context: Any, address: Any, lowest: Any, end: Any) -> Any:
    """Whether any of the 16 floats at `address` is `lowest` or more but less than `end`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _load(builder, _floats_at(builder, args[0]), _I64(0))
        is_within = builder.and_(
            builder.fcmp_ordered(">=", value, _spread(builder, args[1])),
            builder.fcmp_ordered("<", value, _spread(builder, args[2])),
        )
        return builder.icmp_unsigned("!=", builder.bitcast(is_within, _I16), _I16(0))

    return types.boolean(types.int64, types.float32, types.float32), codegen


@intrinsic
def bits_of(typing_context: Any, value: Any) -> Any:
    """The bits of a float32 that is not negative; they order as the values do."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(args[0], _I32), _I64)

    return types.int64(types.float32), codegen


@intrinsic
def float_of(typing_context: Any, bits: Any) -> Any:
    """The float32 of such bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.trunc(args[0], _I32), _FLOAT)

    return types.float32(types.int64), codegen


@intrinsic
def store_int32(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
    """Writes element `index` of the int32 array at `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _I32.as_pointer())
        builder.store(builder.trunc(args[2], _I32), builder.gep(pointer, [args[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen
