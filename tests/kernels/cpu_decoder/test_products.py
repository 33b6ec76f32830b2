"""Products by tiles against torch in float64; a row's result is its own, to the bit."""

import pytest
import torch
from torch import Tensor

from manta.kernels.cpu_decoder.products import ADD, BLOCK_ROWS, SILU_MUL, STORE, interleave, pack_weight
from tests.support.decoder_kernels import NAN, PLAIN, VARIANTS, Variant, multiply
from tests.support.tolerances import KERNEL, relative_error

MODES = {STORE: "store", ADD: "add", SILU_MUL: "silu_mul"}
ROWS = [*range(1, 14), 31, 36, 41, BLOCK_ROWS, BLOCK_ROWS + 1, 2 * BLOCK_ROWS + 1]
SIZES = [(1, 1), (2, 16), (33, 7), (48, 32), (64, 131), (417, 45)]  # in, out
GUARD = 3  # columns and rows of the output that are not the product's


def random_product(variant: Variant, rows: int, num_in: int, num_out: int, mode: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, in] as the kernel reads it, weight [out or 2 * out, in], bias."""
    outputs = 2 * num_out if mode == SILU_MUL else num_out
    x = torch.randn(rows, num_in).to(variant.left).float()
    weight = (torch.randn(outputs, num_in) * num_in**-0.5).to(variant.dtype)
    return x, weight, torch.randn(outputs).to(variant.dtype)


def run(
    variant: Variant, x: Tensor, weight: Tensor, bias: Tensor | None, mode: int, before: Tensor, num_threads: int = 1
) -> Tensor:
    """What becomes of `before` float32 [rows, out]; checks that nothing around it was touched."""
    rows, num_out = before.shape
    dtype = variant.left if mode == SILU_MUL else torch.float32
    memory = torch.full((rows + GUARD, num_out + GUARD), 7.0, dtype=dtype)
    out = memory[:rows, :num_out]
    out.copy_(before)
    multiply(variant, x, weight, bias, mode, out, num_threads)
    result = out.clone()
    out.fill_(7.0)
    assert (memory == 7.0).all(), "written outside of the output"
    return result


def expected_product(x: Tensor, weight: Tensor, bias: Tensor | None, mode: int, before: Tensor) -> Tensor:
    out = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if mode == SILU_MUL:
        gate, up = out.chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up
    return before.double() + out if mode == ADD else out


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("mode", MODES, ids=MODES.get)
@pytest.mark.parametrize(("num_in", "num_out"), SIZES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_products(variant: Variant, num_in: int, num_out: int, mode: int, has_bias: bool) -> None:
    for rows in ROWS:
        x, weight, some_bias = random_product(variant, rows, num_in, num_out, mode)
        bias = some_bias if has_bias else None
        before = torch.randn(rows, num_out) if mode == ADD else torch.full((rows, num_out), NAN)
        out = run(variant, x, weight, bias, mode, before)
        expected = expected_product(x, weight, bias, mode, before)
        assert relative_error(out, expected.to(out.dtype)) < KERNEL[out.dtype], rows
        for num_threads in (2, 3, 40) if rows in (1, 5, 41, BLOCK_ROWS + 1) else ():
            again = run(variant, x, weight, bias, mode, before, num_threads)
            assert torch.equal(again, out), (rows, num_threads)


@pytest.mark.parametrize("mode", MODES, ids=MODES.get)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(variant: Variant, mode: int) -> None:
    rows, num_in, num_out = BLOCK_ROWS + 23, 403, 50
    x, weight, bias = random_product(variant, rows, num_in, num_out, mode)
    before = torch.randn(rows, num_out)
    out = run(variant, x, weight, bias, mode, before)
    for count in range(1, 14):
        for first in (0, 5, BLOCK_ROWS - 1, rows - count):
            some = slice(first, first + count)
            assert torch.equal(run(variant, x[some], weight, bias, mode, before[some]), out[some]), (first, count)


@pytest.mark.parametrize("mode", MODES, ids=MODES.get)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_rows_that_are_no_numbers_harm_no_others(variant: Variant, mode: int) -> None:
    x, weight, bias = random_product(variant, 29, 34, 40, mode)
    before = torch.randn(29, 40)
    expected = run(variant, x, weight, bias, mode, before)
    bad = torch.zeros(29, dtype=torch.bool)
    bad[[0, 13, 27]] = True
    x[bad] = torch.tensor([NAN, float("inf"), -float("inf")])[:, None]
    out = run(variant, x, weight, bias, mode, before)
    assert torch.equal(out[~bad], expected[~bad])
    assert not out[bad].isfinite().any()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_no_rows(variant: Variant) -> None:
    x, weight, bias = random_product(variant, 0, 8, 8, STORE)
    run(variant, x, weight, bias, STORE, torch.zeros(0, 8))


@pytest.mark.parametrize("gate", [-1e30, -500.0, -88.0, 0.0, 88.0, 500.0, 1e30])
def test_silu_of_extreme_gates(gate: float) -> None:
    weight = torch.tensor([[gate], [1.0]])
    out = run(PLAIN[0], torch.ones(1, 1), weight, None, SILU_MUL, torch.zeros(1, 1))
    expected = torch.nn.functional.silu(torch.tensor(gate, dtype=torch.float64))
    assert out.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_out", "num_in"), [(1, 1), (32, 2), (33, 5), (70, 8)])
def test_where_packed_weights_lie(num_out: int, num_in: int, dtype: torch.dtype) -> None:
    weight = torch.arange(1, num_out * num_in + 1).view(num_out, num_in).to(dtype)
    packed = pack_weight(weight)
    panels, inputs = -(-num_out // 32), -(-num_in // 2) * 2
    flat = packed.flatten().tolist()
    assert len(flat) == panels * 32 * inputs
    for o in range(num_out):
        for i in range(num_in):
            panel, lane = divmod(o, 32)
            if dtype == torch.bfloat16:
                at = ((panel * (inputs // 2) + i // 2) * 32 + lane) * 2 + i % 2
            else:
                at = (panel * inputs + i) * 32 + lane
            assert flat[at] == weight[o, i]
            flat[at] = 0.0
    assert not any(flat)  # padding


@pytest.mark.parametrize("size", [1, 16, 21, 48])
def test_interleaved_gates_and_ups(size: int) -> None:
    gate_up = torch.arange(1.0, 2 * size + 1)
    out = interleave(gate_up)
    assert torch.equal(interleave(gate_up[:, None].expand(-1, 3))[:, 2], out)
    expected = torch.zeros(-(-size // 16) * 32)
    for i in range(size):
        expected[i // 16 * 32 + i % 16] = gate_up[i]
        expected[i // 16 * 32 + 16 + i % 16] = gate_up[size + i]
    assert torch.equal(out, expected)
