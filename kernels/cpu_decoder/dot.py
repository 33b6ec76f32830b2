"""Dot products of bfloat16 pairs: one instruction for two multiply-adds where the CPU has it.

AVX-512 BF16 (Intel from Cooper Lake, AMD from Zen 4) multiplies 32 pairs of bfloat16 and adds to 16 float32 at once,
twice what float32 does. Elsewhere the same is written out, which costs more than float32 throughout: `pays` tells.
"""

import functools
from typing import Any

import numpy as np
from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils as untyped_cgutils

from manta.kernels.cpu_scalars import intrinsic, jit

cgutils: Any = untyped_cgutils
LANES = 16

_I32 = ir.IntType(32)
_FLOATS, _INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_I32, LANES)

_HAS_INSTRUCTION = bool(binding.get_host_cpu_features().get("avx512bf16"))


def widened(builder: Any, pairs: Any) -> tuple[Any, Any]:
    """The lower and the upper bfloat16 of each int32 as float32."""
    lower = builder.shl(pairs, ir.Constant(_INTS, [16] * LANES))
    upper = builder.and_(pairs, ir.Constant(_INTS, [0xFFFF0000] * LANES))
    return builder.bitcast(lower, _FLOATS), builder.bitcast(upper, _FLOATS)


def add_dot(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """total float32 + the dot product of the bfloat16 pairs in a and b, lane by lane."""
    return _instruction(builder, total, a, b) if _HAS_INSTRUCTION else _written_out(builder, total, a, b)


def _instruction(builder: Any, total: Any, a: Any, b: Any) -> Any:
    function = ir.FunctionType(_FLOATS, [_INTS, _INTS, _FLOATS])
    return builder.asm(function, "vdpbf16ps $2, $1, $0", "=v,v,v,0", [a, b, total], side_effect=False)


def _written_out(builder: Any, total: Any, a: Any, b: Any) -> Any:
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), "llvm.fma.v16f32")
    for x, y in zip(widened(builder, a), widened(builder, b), strict=True):
        total = builder.call(fma, [x, y, total])
    return total


def _make_test(function: Any) -> Any:
    @intrinsic
    def test(typing_context: Any, a: Any, b: Any, out: Any) -> Any:
        """float32 [16] at `out` += the dot products of int32 [16] at `a` and `b`."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a, b = (
                builder.load(builder.inttoptr(address, _INTS.as_pointer()), align=4) for address in args[:2]
            )  # fmt: skip
            place = builder.inttoptr(args[2], _FLOATS.as_pointer())
            builder.store(function(builder, builder.load(place, align=4), a, b), place, align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return test


_test_dot = _make_test(add_dot)


@jit()
def _dot_once(a: Any, b: Any, out: Any) -> None:
    _test_dot(a, b, out)


@functools.cache
def pays() -> bool:
    """Whether this CPU has the instruction and it does what it should, tried on random pairs."""
    return _HAS_INSTRUCTION and _is_right()


def _is_right() -> bool:
    generator = np.random.default_rng(0)
    for _ in range(4):
        wide = generator.standard_normal((2, LANES, 2)).astype(np.float32)
        bits = wide.view(np.uint32) & np.uint32(0xFFFF0000)
        pairs = (bits[..., 0] >> 16 | bits[..., 1]).astype(np.uint32)
        out = generator.standard_normal(LANES).astype(np.float32)
        expected = out + (bits[0].view(np.float32) * bits[1].view(np.float32)).sum(axis=-1, dtype=np.float64)
        _dot_once(pairs[0].ctypes.data, pairs[1].ctypes.data, out.ctypes.data)
        if not np.allclose(out, expected, rtol=1e-5, atol=1e-5):
            return False
    return True
