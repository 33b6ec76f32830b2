"""Brings memory into the caches before it is needed."""

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils as untyped_cgutils

from manta.kernels.cpu_scalars import intrinsic

cgutils: Any = untyped_cgutils
LINE_BYTES = 64

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_SECOND_LEVEL = _I32(2)


@intrinsic
def fetch_lines(typing_context: Any, address: Any, num_lines: Any) -> Any:
    """Asks for so many cache lines from `address` on, into the second level; any address will do."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        prefetch = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0i8")
        with cgutils.for_range(builder, args[1]) as loop:
            line = builder.add(args[0], builder.mul(loop.index, _I64(LINE_BYTES)))
            builder.call(prefetch, [builder.inttoptr(line, _I8.as_pointer()), _I32(0), _SECOND_LEVEL, _I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
