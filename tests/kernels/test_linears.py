"""Linears for GPUs: which form multiplies what, and that torch's scaled product is called as it wants to be."""

import pytest
import torch
from torch import Tensor

from manta.kernels import fp8, linears, ops
from manta.kernels.gpu import Gpu
from tests.support.tolerances import KERNEL, relative_error

META = torch.device("meta")


@pytest.mark.parametrize("has_bias", [False, True])
def test_scaled_product_of_torch_is_that_of_the_reference(has_bias: bool) -> None:
    torch.manual_seed(1)
    x, weight = fp8.quantize(torch.randn(7, 64)), fp8.quantize(torch.randn(48, 64) * torch.rand(48, 1))
    scales, bias = weight.scales[:, 0].contiguous(), torch.randn(48).bfloat16() if has_bias else None
    exact = (x.values.double() * x.scales) @ (weight.values.double() * weight.scales).T
    exact = exact if bias is None else exact + bias
    for form in (linears.scaled_mm, fp8.scaled_linear):
        out = form(x, weight.values, scales, bias, torch.bfloat16)
        assert out.dtype == torch.bfloat16
        assert relative_error(out, exact) < KERNEL[torch.bfloat16]


def test_a_cpu_takes_the_reference_and_keeps_its_linears() -> None:
    weight = fp8.quantize(torch.randn(3, 5))
    linear = ops.make_fp8_linear(weight.values, weight.scales[:, 0], None, torch.float32)
    assert linear(fp8.quantize(torch.randn(2, 5))).dtype == torch.float32
    assert not ops.has_fp8_products(torch.device("cpu"))


@pytest.mark.parametrize(
    ("shape", "dtype", "batch_invariant", "form"),
    [
        ((48, 64), torch.bfloat16, False, "scaled_mm"),
        ((48, 64), torch.float16, False, "matmul"),
        ((48, 60), torch.bfloat16, False, "matmul"),
        ((20, 64), torch.bfloat16, False, "matmul"),
        ((48, 64), torch.bfloat16, True, "matmul"),
    ],
)
def test_which_form_multiplies(
    shape: tuple[int, int], dtype: torch.dtype, batch_invariant: bool, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from manta.kernels import matmul_triton

    asked: list[str] = []

    def record(name: str) -> None:
        def run(*_: object, **__: object) -> Tensor:
            asked.append(name)
            return torch.zeros(1)

        module = linears if name == "scaled_mm" else matmul_triton
        monkeypatch.setattr(module, "scaled_mm" if name == "scaled_mm" else "scaled_linear", run)

    record("scaled_mm")
    record("matmul")
    weight = torch.empty(shape, dtype=torch.float8_e4m3fn, device=META)
    linears.make_fp8_linear(weight, torch.empty(shape[0], device=META), None, dtype, batch_invariant)(
        fp8.Fp8Rows(torch.empty(1, shape[1]), torch.empty(1, 1))
    )
    assert asked == [form]


def test_devices_with_fp8_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "find_spec", lambda _: object())
    for capability in (80, 86, 89, 90, 100):
        monkeypatch.setattr(linears, "gpu_of", lambda _, capability=capability: Gpu(capability, 1))
        assert linears.has_fp8_products(torch.device("cuda")) == (capability >= 89)
    monkeypatch.setattr(linears, "find_spec", lambda _: None)
    assert not linears.has_fp8_products(torch.device("cuda"))


def test_batch_invariance_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from manta.kernels import matmul_triton

    monkeypatch.setattr(ops, "_gpu_attention", None)
    monkeypatch.setattr(ops, "_batch_invariant", False)
    monkeypatch.setattr(matmul_triton, "linear", lambda x, weight, bias: "fixed")
    weight = torch.empty(4, 4, device=META)
    assert ops.make_linear(weight, None)(weight).shape == (4, 4)  # type: ignore[comparison-overlap]
    ops.use_attention(batch_invariant=True)
    assert ops.is_batch_invariant()
    assert ops.make_linear(weight, None)(weight) == "fixed"  # type: ignore[comparison-overlap]
