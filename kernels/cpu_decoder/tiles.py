"""The innermost loop of every matrix product on the CPU: a few rows times two columns of 16 lanes.

The right-hand side lies in panels, so that each step of the loop reads whole vectors: bfloat16 as [K / 2][lanes][2]
(two values of k side by side: one shift and one mask widen 32 of them to float32), float16 and float32 as [K][lanes].
Accumulators stay in registers over the whole of K, and every element is summed in the order of k whatever the number of
rows: a row's result does not depend on the rows beside it.

Tile sizes follow the count of vector registers, as in Goto and van de Geijn (2008), "Anatomy of high-performance matrix
multiplication": MAX_ROWS x 2 accumulators, two or four widened vectors, and broadcasts of the left-hand side.
"""

from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils as untyped_cgutils

from manta.kernels.cpu_decoder.dot import add_dot, widened
from manta.kernels.cpu_scalars import intrinsic, jit

cgutils: Any = untyped_cgutils
LANES = 16
COLUMNS = 2 * LANES  # of a tile

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_FLOAT, _HALF = ir.FloatType(), ir.HalfType()
_FLOATS, _HALVES, _INTS = (ir.VectorType(kind, LANES) for kind in (_FLOAT, _HALF, _I32))
_SPLAT = ir.Constant(_INTS, [0] * LANES)


def _max_rows() -> int:
    """Rows of the largest tile: 32 vector registers of 16 lanes hold 12 x 2 accumulators, smaller ones 3 x 2."""
    features = binding.get_host_cpu_features()
    return 12 if features.get("avx512f") else 3


MAX_ROWS = _max_rows()


def _left_vector(builder: Any, address: Any, part: int, is_dot: bool) -> Any:
    """All lanes = the left-hand side's k + part: a float32, or a pair of bfloat16 as an int32."""
    element, vector = (_I32, _INTS) if is_dot else (_FLOAT, _FLOATS)
    pointer = builder.inttoptr(address, element.as_pointer())
    value = builder.load(builder.gep(pointer, [_I64(part)]), align=4)
    lane = builder.insert_element(ir.Constant(vector, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(lane, ir.Constant(vector, ir.Undefined), _SPLAT)


def _right_vectors(builder: Any, address: Any, step: Any, is_dot: bool, kind: Any) -> tuple[Any, ...]:
    """The 16 values of k and of k + 1 at `address`, as float32, or in one vector for dot products of pairs; `step`
    bytes further is k + 2."""
    if kind == types.uint16:
        pairs = builder.load(builder.inttoptr(address, _INTS.as_pointer()), align=4)
        return (pairs,) if is_dot else widened(builder, pairs)
    vector = _HALVES if kind == types.int16 else _FLOATS
    values = []
    for start in (address, builder.add(address, builder.lshr(step, _I64(1)))):
        value = builder.load(builder.inttoptr(start, vector.as_pointer()), align=2)
        values.append(builder.fpext(value, _FLOATS) if kind == types.int16 else value)
    return values[0], values[1]


def _make_tile(num_rows: int) -> Any:
    @intrinsic
    def tile(
        typing_context: Any, x: Any, x_stride: Any, table: Any, num_segments: Any, offset0: Any, offset1: Any,
        step: Any, half_k: Any, ahead: Any, out: Any, out_stride: Any, accumulate: Any, left: Any, kind: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            (
                x, x_stride, table, num_segments, offset0, offset1, step, half_k, ahead, out, out_stride, accumulate,
                *_,
            ) = args  # fmt: skip
            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), "llvm.fma.v16f32"
            )
            prefetch = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32]),
                "llvm.prefetch.p0i8",
            )  # fmt: skip
            # LLVM keeps these in registers
            sums = [[cgutils.alloca_once(builder, _FLOATS) for _ in range(2)] for _ in range(num_rows)]
            start = builder.inttoptr(out, _FLOAT.as_pointer())
            outs = [
                [
                    builder.bitcast(
                        builder.gep(start, [builder.add(builder.mul(out_stride, _I64(r)), _I64(j * LANES))]),
                        _FLOATS.as_pointer(),
                    )
                    for j in range(2)
                ]
                for r in range(num_rows)
            ]
            with builder.if_else(builder.icmp_signed("!=", accumulate, _I64(0))) as (then, otherwise):
                with then:
                    for r in range(num_rows):
                        for j in range(2):
                            builder.store(builder.load(outs[r][j], align=4), sums[r][j])
                with otherwise:
                    for r in range(num_rows):
                        for j in range(2):
                            builder.store(ir.Constant(_FLOATS, [0.0] * LANES), sums[r][j])
            is_dot = left == types.uint16
            item_bytes = _I64(2 if is_dot else 4)
            rows = [builder.add(x, builder.mul(builder.mul(x_stride, _I64(r)), item_bytes)) for r in range(num_rows)]
            table = builder.inttoptr(table, _I64.as_pointer())
            with cgutils.for_range(builder, num_segments) as segments:
                base = builder.load(builder.gep(table, [segments.index]))
                k_start = builder.mul(segments.index, builder.shl(half_k, _I64(1)))
                with cgutils.for_range(builder, half_k) as loop:
                    at = builder.add(base, builder.mul(loop.index, step))
                    right = []
                    for offset in (offset0, offset1):
                        address = builder.add(at, offset)
                        right.append(_right_vectors(builder, address, step, is_dot, kind))
                        line = builder.inttoptr(builder.add(address, ahead), _I8.as_pointer())
                        builder.call(prefetch, [line, _I32(0), _I32(3), _I32(1)])
                    k = builder.add(k_start, builder.shl(loop.index, _I64(1)))
                    for r in range(num_rows):
                        start = builder.add(rows[r], builder.mul(k, item_bytes))
                        for part in range(1 if is_dot else 2):
                            value = _left_vector(builder, start, part, is_dot)
                            for j in range(2):
                                total = builder.load(sums[r][j])
                                if is_dot:
                                    total = add_dot(builder, total, value, right[j][0])
                                else:
                                    total = builder.call(fma, [value, right[j][part], total])
                                builder.store(total, sums[r][j])
            for r in range(num_rows):
                for j in range(2):
                    builder.store(builder.load(sums[r][j]), outs[r][j], align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 12, left, kind), codegen

    return tile


_tile_12, _tile_8, _tile_6, _tile_4 = _make_tile(12), _make_tile(8), _make_tile(6), _make_tile(4)
_tile_3, _tile_2, _tile_1 = _make_tile(3), _make_tile(2), _make_tile(1)


@jit()
def multiply_tile(
    num_rows: Any, x: Any, x_stride: Any, table: Any, num_segments: Any, offset0: Any, offset1: Any, step: Any,
    half_k: Any, ahead: Any, out: Any, out_stride: Any, accumulate: Any, left: Any, kind: Any,
) -> None:  # fmt: skip
    """out [num_rows, 32] = (or, with `accumulate`, +=) x [num_rows, num_segments * 2 * half_k] @ right.

    x: address of elements of the kind `left`, float32 or, for dot products of bfloat16 pairs, bfloat16 (`dot`); out:
    address of float32; strides in elements. The right-hand side's rows lie in segments of 2 * half_k, whose
    addresses are the int64s at `table`; offset0 and offset1 are where in a segment the two columns of 16 lanes begin,
    `step` how far it is to the next pair of rows, all in bytes. What lies
    `ahead` bytes further is fetched into the caches meanwhile. Rows of x and out may be read and written up to the
    next tile size; there must be memory for MAX_ROWS.
    """
    if MAX_ROWS < 12:
        if num_rows == 1:
            _tile_1(
                x, x_stride, table, num_segments, offset0, offset1, step, half_k, ahead, out, out_stride, accumulate,
                left, kind,
            )  # fmt: skip
        elif num_rows == 2:
            _tile_2(
                x, x_stride, table, num_segments, offset0, offset1, step, half_k, ahead, out, out_stride, accumulate,
                left, kind,
            )  # fmt: skip
        else:
            _tile_3(
                x, x_stride, table, num_segments, offset0, offset1, step, half_k, ahead, out, out_stride, accumulate,
                left, kind,
            )  # fmt: skip
    elif num_rows > 8:
        _tile_12(
            x, x_stride, table, num_segments, offset0, offset1, step, half_k, ahead, out, out_stride, accumulate,
            left, kind,
        )  # fmt: skip
    elif num_rows > 6:
        _tile_8(
            x, x_stride, table, num_segments, offset0, offset1, step, half_k, ahead, out, out_stride, accumulate,
            left, kind,
        )  # fmt: skip
    elif num_rows > 4:
        _tile_6(
            x, x_stride, table, num_segments, offset0, offset1, step, half_k, ahead, out, out_stride, accumulate,
            left, kind,
        )  # fmt: skip
    elif num_rows > 3:
        _tile_4(
            x, x_stride, table, num_segments, offset0, offset1, step, half_k, ahead, out, out_stride, accumulate,
            left, kind,
        )  # fmt: skip
    elif num_rows > 2:
        _tile_3(
            x, x_stride, table, num_segments, offset0, offset1, step, half_k, ahead, out, out_stride, accumulate,
            left, kind,
        )  # fmt: skip
    elif num_rows > 1:
        _tile_2(
            x, x_stride, table, num_segments, offset0, offset1, step, half_k, ahead, out, out_stride, accumulate,
            left, kind,
        )  # fmt: skip
    else:
        _tile_1(
            x, x_stride, table, num_segments, offset0, offset1, step, half_k, ahead, out, out_stride, accumulate,
            left, kind,
        )  # fmt: skip


@intrinsic
def widen_panel(
    typing_context: Any, panel: Any, half_k: Any, step: Any, offset: Any, out: Any, kind: Any
) -> Any:  # fmt: skip
    """out float32 [2 * half_k, 32] = pairs of rows of a panel, `step` bytes apart; `offset` is where in a pair the
    second 16 columns begin."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        panel, half_k, step, offset, out, _ = args
        with cgutils.for_range(builder, half_k) as loop:
            at = builder.add(panel, builder.mul(loop.index, step))
            target = builder.add(out, builder.mul(loop.index, _I64(8 * COLUMNS)))
            for j, start in enumerate((at, builder.add(at, offset))):
                for k, vector in enumerate(_right_vectors(builder, start, step, False, kind)):
                    place = builder.add(target, _I64(4 * (k * COLUMNS + j * LANES)))
                    builder.store(vector, builder.inttoptr(place, _FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, kind), codegen
