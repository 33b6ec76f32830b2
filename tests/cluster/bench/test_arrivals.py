"""Gaps between requests against the distribution functions they should have."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from manta.cluster.bench.arrivals import arrival_times_s

NUM = 4000
RATE = 7.0
ONE_PER_CENT = 1.63 / math.sqrt(NUM)  # Kolmogorov-Smirnov: this distance is exceeded by chance in 1 % of the cases


def _erlang(k: int) -> Callable[[float], float]:
    """Distribution function of a gamma distribution of integer shape k and mean 1."""
    return lambda x: 1 - math.exp(-k * x) * sum((k * x) ** i / math.factorial(i) for i in range(k))


def _gaps(burstiness: float, seed: int) -> np.ndarray:
    times = arrival_times_s(NUM, RATE, burstiness, seed)
    return np.diff(times, prepend=0.0) * RATE


@pytest.mark.parametrize("burstiness", [1, 2, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_gaps_follow_the_gamma_distribution(burstiness: int, seed: int) -> None:
    ordered = np.sort(_gaps(burstiness, seed))
    expected = np.array([_erlang(burstiness)(gap) for gap in ordered])
    steps = np.arange(NUM + 1) / NUM
    distance = max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())
    assert distance < ONE_PER_CENT
    other = np.array([_erlang(burstiness + 1)(gap) for gap in ordered])
    assert np.abs(other - steps[1:]).max() > ONE_PER_CENT, "the test could not tell another burstiness"


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_mean_and_variation(burstiness: float) -> None:
    gaps = _gaps(burstiness, 0)
    assert gaps.mean() == pytest.approx(1.0)
    assert gaps.std() == pytest.approx(1 / math.sqrt(burstiness), rel=0.1)
    assert (gaps >= 0).all()


def test_ends_and_seeds() -> None:
    assert arrival_times_s(NUM, RATE, 1.0, 0)[-1] == pytest.approx(NUM / RATE)
    assert (arrival_times_s(50, RATE, 1.0, 0) == arrival_times_s(50, RATE, 1.0, 0)).all()
    assert (arrival_times_s(50, RATE, 1.0, 0) != arrival_times_s(50, RATE, 1.0, 1))[:-1].all()
    assert arrival_times_s(4, math.inf, 1.0, 0).tolist() == [0, 0, 0, 0]
    assert arrival_times_s(4, 2.0, math.inf, 0).tolist() == [0.5, 1.0, 1.5, 2.0]
