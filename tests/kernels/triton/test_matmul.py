"""Products that do not depend on the batch: values against torch in float64, and the same bits for every row count."""

import pytest
import torch
from torch import Tensor

from manta.kernels import fp8, gpu, linears
from tests.support.tolerances import KERNEL, relative_error
from tests.support.triton_device import DEVICE, INTERPRETED

pytest.importorskip("triton", reason="triton is not installed")
from manta.kernels import matmul_triton

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

# bfloat16 as float32 in the interpreter, but loaded and stored by truncation there
TOLERANCE = KERNEL | {torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def oracle(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x.double() @ weight.double().T
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_in", "num_out"), [(48, 20), (600, 130), (1024, 64)])
@pytest.mark.parametrize("num_rows", [1, 70])
def test_values(num_rows: int, num_in: int, num_out: int, dtype: torch.dtype) -> None:
    x, weight, bias = randn(num_rows, num_in + 8, dtype=dtype), randn(num_out, num_in, dtype=dtype), None
    for bias in (None, randn(num_out, dtype=dtype)):
        out = matmul_triton.linear(x[:, :num_in], weight, bias)
        assert out.dtype == dtype
        assert relative_error(out, oracle(x[:, :num_in], weight, bias)) < TOLERANCE[dtype]


def test_no_rows() -> None:
    assert matmul_triton.linear(randn(0, 32), randn(16, 32), None).shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rows_have_the_same_bits_in_every_batch(dtype: torch.dtype) -> None:
    """1 to 33 rows and 100, split over programs or not: row i of all is row i of each."""
    weight, bias = randn(72, 1100, dtype=dtype), randn(72, dtype=dtype)
    x = randn(100, 1100, dtype=dtype)
    plan = matmul_triton.tiling(72, 1100, dtype.itemsize)
    assert plan.num_splits > 2
    expected = _with_sms(1, lambda: matmul_triton.linear(x, weight, bias))  # one SM: never split over programs
    assert relative_error(expected, oracle(x, weight, bias)) < TOLERANCE[dtype]
    for num_rows in (*range(1, 34), 64, 100):
        first = 100 - num_rows if num_rows % 2 else 0
        out = matmul_triton.linear(x[first : first + num_rows], weight, bias)
        assert torch.equal(out, expected[first : first + num_rows]), num_rows


def _with_sms(num_sms: int, run):  # type: ignore[no-untyped-def]
    if not INTERPRETED:
        return run()
    gpu.pretend(gpu.Gpu(90, num_sms))
    try:
        return run()
    finally:
        gpu.pretend(gpu.STAND_IN)


@pytest.mark.parametrize("num_rows", [1, 33, 130])
@pytest.mark.parametrize("has_bias", [False, True])
def test_fp8(num_rows: int, has_bias: bool) -> None:
    if not INTERPRETED and not gpu.gpu_of(DEVICE).converts_e4m3:
        pytest.skip("this GPU has no fp8 products")
    x, weight = fp8.quantize(randn(num_rows, 640)), fp8.quantize(randn(144, 640))
    bias = randn(144, dtype=torch.float16) if has_bias else None
    scales = weight.scales[:, 0].contiguous()
    out = matmul_triton.scaled_linear(x, weight.values, scales, bias, torch.float16)
    expected = oracle(fp8.dequantize(x, torch.float32), fp8.dequantize(weight, torch.float32), bias)
    assert relative_error(out, expected) < KERNEL[torch.float16]
    again = matmul_triton.scaled_linear(fp8.Fp8Rows(x.values[:1], x.scales[:1]), weight.values, scales, bias, out.dtype)
    assert torch.equal(again, out[:1])


@pytest.mark.parametrize("num_rows", [1, 33, 256])
def test_scaled_product_of_torch_on_this_device(num_rows: int) -> None:
    if not INTERPRETED and not gpu.gpu_of(DEVICE).converts_e4m3:
        pytest.skip("this GPU has no fp8 products")
    x, weight = fp8.quantize(randn(num_rows, 640)), fp8.quantize(randn(144, 640))
    scales = weight.scales[:, 0].contiguous()
    for bias in (None, randn(144, dtype=torch.bfloat16)):
        out = linears.scaled_mm(x, weight.values, scales, bias, torch.bfloat16)
        expected = oracle(fp8.dequantize(x, torch.float32), fp8.dequantize(weight, torch.float32), bias)
        assert relative_error(out, expected) < KERNEL[torch.bfloat16]


def test_tiling_follows_from_the_weight_alone() -> None:
    for num_out, num_in in ((4096, 14336), (6144, 4096), (128256, 4096), (576, 1536)):
        plan = matmul_triton.tiling(num_out, num_in, 2)
        assert (plan.num_splits - 1) * plan.split < num_in <= plan.num_splits * plan.split
        assert plan.split % plan.block_k == 0
