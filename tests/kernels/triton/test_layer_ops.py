"""Norms, gated activation, rotation and KV write in Triton against their references: odd shapes, dtypes, fp8."""

import pytest
import torch
from torch import Tensor

from manta.kernels import fp8, reference
from tests.support.paging import PagedSequences
from tests.support.tolerances import KERNEL, relative_error
from tests.support.triton_device import DEVICE, INTERPRETED

pytest.importorskip("triton", reason="triton is not installed")
from manta.kernels import fp8_triton, quantize_triton, rms_norm_triton, rope_kv_write_triton, silu_mul_triton

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALE = torch.tensor([0.25], device=DEVICE)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def close(actual: Tensor, expected: Tensor) -> bool:
    return relative_error(actual, expected) < KERNEL[expected.dtype]


def same_e4m3(actual: Tensor, expected: Tensor) -> bool:
    """Sums in another order may move a value over the border to the next code, no farther, and seldom."""
    assert actual.dtype == expected.dtype == torch.float8_e4m3fn
    codes = [torch.where(x >= 128, 128 - x, x) for x in (t.view(torch.uint8).int() for t in (actual, expected))]
    difference = (codes[0] - codes[1]).abs()
    return bool((difference <= 1).all()) and int((difference > 0).sum()) <= 1 + difference.numel() // 500


def close_fp8(actual: fp8.Fp8Rows, expected: fp8.Fp8Rows) -> None:
    assert actual.scales.shape == expected.scales.shape == (len(expected.values), 1)
    assert close(actual.scales, expected.scales)
    assert same_e4m3(actual.values, expected.values)


def test_e4m3_of_every_code_and_between() -> None:
    """The oracle is torch's conversion, which saturates for none: values are clamped before."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        fp8_triton.store_rounded(out + at, tl.load(x + at, mask=at < n, other=0.0), 1.0, at < n, True)

    kernel.fn.__globals__.update(tl=tl, fp8_triton=fp8_triton)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = codes[codes.isfinite()].sort().values
    between = torch.cat([finite[:-1] + (finite[1:] - finite[:-1]) * share for share in (0.25, 0.499, 0.5, 0.501)])
    x = torch.cat((codes, between, torch.randn(500) * 200, torch.tensor([1e-9, -1e-9, 1e30, -torch.inf]))).to(DEVICE)
    out = torch.zeros(x.shape, dtype=torch.uint8, device=DEVICE)
    kernel[(triton.cdiv(x.numel(), 256),)](x, out, x.numel(), BLOCK=256)
    expected = fp8.to_e4m3(x, torch.ones(1, device=DEVICE)).view(torch.uint8)
    is_nan = x.isnan()
    assert torch.equal(out[~is_nan], expected[~is_nan])
    assert bool((out[is_nan] & 0x7F == 0x7F).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (1, 48), (3, 577), (65, 60)])
def test_rms_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    x, weight = randn(rows, size, dtype=dtype), torch.rand(size).to(DEVICE, dtype)
    assert close(rms_norm_triton.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    strided = randn(rows, size + 5, dtype=dtype)[:, :size]
    assert close(rms_norm_triton.rms_norm(strided, weight, 1e-5), reference.rms_norm(strided, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (1, 48), (3, 577), (65, 60)])
def test_add_rms_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    x, residual = randn(rows, size, dtype=dtype), randn(rows, size, dtype=dtype)
    weight = torch.rand(size).to(DEVICE, dtype)
    expected_residual = residual.clone()
    expected = reference.add_rms_norm(x, expected_residual, weight, 1e-5)
    assert close(rms_norm_triton.add_rms_norm(x, residual, weight, 1e-5), expected)
    assert close(residual, expected_residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (1, 48), (3, 577), (65, 60), (2, 1500)])
@pytest.mark.parametrize("scale", [None, SCALE], ids=["dynamic", "static"])
def test_fp8_outputs(rows: int, size: int, dtype: torch.dtype, scale: Tensor | None) -> None:
    """Norms, the gated activation and plain rows, with one scale for all or with each row's own; the last row is 0."""
    x, residual = randn(rows, size, dtype=dtype) * 3, randn(rows, size, dtype=dtype)
    gate_up, weight = randn(rows, 2 * size, dtype=dtype) * 4, torch.rand(size).to(DEVICE, dtype)
    for t in (x, residual, gate_up)[: 3 * (rows > 1)]:
        t[-1] = 0
    close_fp8(rms_norm_triton.rms_norm_fp8(x, weight, 1e-5, scale), reference.rms_norm_fp8(x, weight, 1e-5, scale))
    close_fp8(silu_mul_triton.silu_mul_fp8(gate_up, scale), reference.silu_mul_fp8(gate_up, scale))
    wide = randn(rows, size + 7, dtype=dtype)[:, :size]
    close_fp8(quantize_triton.quantize(wide, scale), fp8.quantize(wide, scale))
    if INTERPRETED and dtype == torch.bfloat16:
        return  # the interpreter truncates the residual to bfloat16, which moves codes of fp8
    expected_residual = residual.clone()
    expected = reference.add_rms_norm_fp8(x, expected_residual, weight, 1e-5, scale)
    close_fp8(rms_norm_triton.add_rms_norm_fp8(x, residual, weight, 1e-5, scale), expected)
    assert close(residual, expected_residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (2, 88), (33, 129), (2, 1500)])
def test_silu_mul(rows: int, size: int, dtype: torch.dtype) -> None:
    gate_up = (torch.randn(rows, 2 * size) * 20).to(DEVICE, dtype)
    assert close(silu_mul_triton.silu_mul(gate_up), reference.silu_mul(gate_up))


def test_silu_mul_of_extreme_gates() -> None:
    gate = torch.tensor([[-1e30, -500.0, -88.0, 0.0, 88.0, 500.0, 1e30]], device=DEVICE)
    out = silu_mul_triton.silu_mul(torch.cat((gate, torch.ones_like(gate)), dim=1))
    assert torch.allclose(out, torch.nn.functional.silu(gate))


def test_no_rows() -> None:
    empty = randn(0, 8)
    assert rms_norm_triton.rms_norm(empty, randn(8), 1e-5).shape == (0, 8)
    assert silu_mul_triton.silu_mul(empty).shape == (0, 4)
    assert quantize_triton.quantize(empty).values.shape == silu_mul_triton.silu_mul_fp8(randn(0, 16)).values.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norms", ["", "q", "k", "qk"], ids=["plain", "q_norm", "k_norm", "norms"])
@pytest.mark.parametrize("is_fp8", [False, True], ids=["pages", "fp8pages"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim"), [(6, 2, 20), (1, 1, 2), (4, 4, 64), (9, 3, 80)])
def test_rope_kv_write(
    num_heads: int, num_kv_heads: int, dim: int, is_fp8: bool, norms: str, dtype: torch.dtype
) -> None:
    sequences = PagedSequences(block_size=8, num_blocks=12)
    metadata = sequences.step([(0, 1), (1, 19), (2, 7)])
    slots = metadata.slot_mapping.to(DEVICE)
    qkv = randn(27, (num_heads + 2 * num_kv_heads) * dim, dtype=dtype)
    cos_sin = torch.randn(27, dim // 2).repeat(1, 2).to(DEVICE)
    q_norm, k_norm = (torch.rand(dim).to(DEVICE, dtype) if name in norms else None for name in "qk")
    page_dtype = torch.float8_e4m3fn if is_fp8 else dtype
    scales = (torch.tensor([0.5], device=DEVICE), torch.tensor([0.125], device=DEVICE)) if is_fp8 else (None, None)
    results = []
    for kernel in (rope_kv_write_triton.rope_kv_write, reference.rope_kv_write):
        keys, values = (torch.zeros(12, num_kv_heads, 8, dim, device=DEVICE).to(page_dtype) for _ in range(2))
        mine = qkv.clone()
        kernel(mine, cos_sin, slots, keys, values, q_norm, k_norm, 1e-6, *scales)
        results.append((mine[:, : num_heads * dim], keys, values))
    for actual, expected in zip(*results, strict=True):
        assert same_e4m3(actual, expected) if expected.dtype == torch.float8_e4m3fn else close(actual, expected)


def test_tokens_that_are_not_there_write_nothing() -> None:
    qkv, cos_sin = randn(4, 4 * 16), randn(4, 16)
    slots = torch.tensor([-1, 9, -1, 17], device=DEVICE)
    keys, values = torch.zeros(4, 1, 8, 16, device=DEVICE), torch.zeros(4, 1, 8, 16, device=DEVICE)
    mine = qkv.clone()
    rope_kv_write_triton.rope_kv_write(mine, cos_sin, slots, keys, values)
    expected = torch.zeros_like(keys), torch.zeros_like(values)
    reference.rope_kv_write(qkv[[1, 3]], cos_sin[[1, 3]], slots[[1, 3]], *expected)
    assert close(keys, expected[0])
    assert close(values, expected[1])
