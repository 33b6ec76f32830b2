"""Rows of float32 in vectors of 16, against numpy in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from numba import njit
from numpy.typing import NDArray

from manta.kernels.cpu_decoder import vectors
from manta.kernels.cpu_scalars import KINDS
from tests.support.decoder_kernels import NAN

Row = NDArray[np.float32]
LOWEST = -1e30


@njit
def _greatest(address: Any, num_vectors: Any) -> Any:
    return vectors.greatest(address, num_vectors)


@njit
def _exp_row(address: Any, num_vectors: Any, highest: Any, out: Any, kind: Any) -> Any:
    return vectors.exp_row(address, num_vectors, highest, out, kind)


@njit
def _silu_mul_row(gate: Any, up: Any) -> None:
    vectors.silu_mul_row(gate, up)


@njit
def _shrink_rows(before: Any, now: Any, factor: Any, num_vectors: Any) -> None:
    vectors.shrink_rows(before, now, factor, num_vectors)


def greatest(row: Row) -> float:
    return float(_greatest(row.ctypes.data, row.size // 16))


def exp_row(row: Row, highest: float, dtype: torch.dtype = torch.float32) -> tuple[Row, float]:
    """The weights as float32 and their sum; looks that nothing is written behind them."""
    out = torch.full((row.size + 16,), 7.0, dtype=dtype)
    total = _exp_row(row.ctypes.data, row.size // 16, np.float32(highest), out.data_ptr(), KINDS[dtype])
    assert (out[row.size :] == 7.0).all()
    return out[: row.size].float().numpy(), float(total)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(4)


@pytest.mark.parametrize("num_vectors", [1, 2, 3, 8, 31])
def test_greatest(num_vectors: int, random: np.random.Generator) -> None:
    for _ in range(40):
        row = random.normal(-50, 30, 16 * num_vectors).astype(np.float32)
        assert greatest(row) == row.max()


def test_greatest_wherever_it_is() -> None:
    for at in range(48):
        row = np.full(48, -3, np.float32)
        row[at] = -2
        assert greatest(row) == -2
        row[at] = np.inf
        assert greatest(row) == np.inf


def test_greatest_passes_over_nan(random: np.random.Generator) -> None:
    row = random.normal(0, 3, 64).astype(np.float32)
    row[random.permutation(64)[:40]] = NAN
    assert greatest(row) == np.nanmax(row)


@pytest.mark.parametrize(("value", "expected"), [(NAN, -np.inf), (-np.inf, -np.inf), (LOWEST, np.float32(LOWEST))])
def test_greatest_of_the_lowest(value: float, expected: float) -> None:
    assert greatest(np.full(32, value, np.float32)) == expected


@pytest.mark.parametrize("lowest", [-0.7, -8.0, -80.0])
@pytest.mark.parametrize("num_vectors", [1, 2, 7, 4096])
def test_exp_row(num_vectors: int, lowest: float) -> None:
    below = np.linspace(lowest, 0, 16 * num_vectors).astype(np.float32)
    row = below + np.float32(5)
    below = row - np.float32(5)
    weights, total = exp_row(row, 5.0)
    # x / ln 2 is rounded before it becomes an exponent: its error grows with x
    tolerance = 3e-7 + 2.0**-23 * np.abs(below)
    assert (np.abs(weights / np.exp(below.astype(np.float64)) - 1) < tolerance).all()
    assert total == pytest.approx(float(weights.sum(dtype=np.float64)), rel=1e-5)


def test_weights_of_the_greatest_are_one() -> None:
    weights, total = exp_row(np.full(32, 123.456, np.float32), float(np.float32(123.456)))
    assert (weights == 1).all()
    assert total == 32


@pytest.mark.parametrize("value", [-88.0, -1000.0, LOWEST, -3e38, -np.inf])
def test_far_below_the_greatest(value: float) -> None:
    """Nothing negative, infinite or NaN: too small for float32 is as good as zero."""
    row = np.full(16, value, np.float32)
    row[3] = 0
    weights, total = exp_row(row, 0.0)
    others = np.delete(weights, 3)
    assert (others >= 0).all()
    assert (others < 1e-37).all()
    assert (weights[3], total) == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_stays_in_its_lane(dtype: torch.dtype) -> None:
    row = np.linspace(-4, 0, 32, dtype=np.float32)
    expected, _ = exp_row(row, 0.0, dtype)
    bad = [0, 5, 31]
    row[bad] = (NAN, -NAN, np.inf - np.inf)
    weights, total = exp_row(row, 0.0, dtype)
    assert np.isnan(weights[bad]).all()
    np.testing.assert_array_equal(np.delete(weights, bad), np.delete(expected, bad))
    assert np.isnan(total)


def test_weights_may_replace_scores(random: np.random.Generator) -> None:
    row = -np.abs(random.normal(0, 5, 64)).astype(np.float32)
    expected, expected_total = exp_row(row, 0.0)
    total = _exp_row(row.ctypes.data, 4, np.float32(0), row.ctypes.data, KINDS[torch.float32])
    np.testing.assert_array_equal(row, expected)
    assert total == expected_total


def test_bfloat16_rounds_to_nearest_ties_to_even() -> None:
    """Rows dense enough to hit exact ties, above and below an even value, as torch rounds them."""
    row = np.linspace(-6, 0, 1 << 20, dtype=np.float32)
    wide, total = exp_row(row, 0.0)
    bits = wide.view(np.uint32)
    ties = bits & 0xFFFF == 0x8000
    assert (ties & (bits & 0x10000 == 0)).any()
    assert (ties & (bits & 0x10000 != 0)).any()
    rounded, rounded_total = exp_row(row, 0.0, torch.bfloat16)
    np.testing.assert_array_equal(rounded, torch.from_numpy(wide).bfloat16().float().numpy())
    assert rounded_total == total  # before rounding


def test_silu_of_a_row(random: np.random.Generator) -> None:
    for scale in (0.1, 3.0, 40.0):
        gate, up = (random.normal(0, scale, 16).astype(np.float32) for _ in range(2))
        wide = gate.astype(np.float64)
        expected = wide / (1 + np.exp(-wide)) * up
        _silu_mul_row(gate.ctypes.data, up.ctypes.data)
        np.testing.assert_allclose(gate, expected, rtol=2e-5, atol=1e-35)


def test_silu_of_extremes_and_nan_by_lane() -> None:
    gate = np.zeros(16, np.float32)
    gate[:5] = (NAN, 1e30, -1e30, np.inf, -500)
    _silu_mul_row(gate.ctypes.data, np.full(16, 2, np.float32).ctypes.data)
    assert np.isnan(gate[0])
    assert tuple(gate[1:4]) == (np.float32(2e30), pytest.approx(0, abs=1e-7), np.inf)
    np.testing.assert_allclose(gate[4:], 0, atol=1e-30)


def test_factors_of_maxima_that_rose(random: np.random.Generator) -> None:
    before = random.normal(0, 9, 48).astype(np.float32)
    now = before + np.abs(random.normal(0, 5, 48)).astype(np.float32)
    now[7:20], before[40:] = before[7:20], LOWEST
    expected = np.exp(before.astype(np.float64) - now)
    factor = np.empty(48, np.float32)
    _shrink_rows(before.ctypes.data, now.ctypes.data, factor.ctypes.data, 3)
    np.testing.assert_allclose(factor, expected, rtol=1e-5, atol=1e-37)
    assert (factor[7:20] == 1).all()
    np.testing.assert_array_equal(before, now)
