"""float32 -> the bits of float8 e4m3 (torch.float8_e4m3fn), in integer arithmetic: also on GPUs without that type.

Format: Micikevicius et al., "FP8 formats for deep learning" (2022): 4 bits of exponent with bias 7, 3 of mantissa, no
infinity, greatest value 448. Rounds to nearest, ties to even; what is beyond 448 becomes 448, NaN stays NaN.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def to_e4m3(x):
    """uint8, the shape of x (float32)."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2 ** -6 values are multiples of 2 ** -9, which is what a float32 at 2 ** 14 has as its last bit.
    subnormal = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(bits < 0x3C800000, subnormal, normal)
    code = tl.where(x != x, 0x7F, code)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.uint8)


@triton.jit
def store_rounded(pointer, x, scale, mask, IS_FP8: tl.constexpr):
    """Stores x (float32) as the pointer's dtype; with IS_FP8, x / scale as e4m3 to uint8."""
    if IS_FP8:
        tl.store(pointer, to_e4m3(x / scale), mask=mask)
    else:
        tl.store(pointer, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def store_fp8(out, scales, y, scale, inside, IS_DYNAMIC: tl.constexpr):
    """Stores y (float32, 0 where not inside) / s as e4m3 to uint8, and s to `scales`.

    s is the value at `scale`, or with IS_DYNAMIC the greatest magnitude of y / 448, as `fp8.quantize` has it.
    """
    if IS_DYNAMIC:
        most = tl.max(tl.abs(y), axis=0)
        s = tl.where(most > 0.0, most * (1.0 / 448.0), 1.0)
    else:
        s = tl.load(scale)
    tl.store(scales, s)
    tl.store(out, to_e4m3(y / s), mask=inside)
