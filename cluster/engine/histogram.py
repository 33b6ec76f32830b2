"""Counters and histograms that take a whole step's observations at once.

prometheus_client takes microseconds per observation; a step observes hundreds of values. The engine therefore counts in
its own few lines, and hands prometheus_client the sums when somebody asks.
"""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

REQUEST_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)


class Counter:
    """A number that only grows. `name` without the _total that Prometheus appends."""

    def __init__(self, name: str, documentation: str) -> None:
        self.name = name
        self.documentation = documentation
        self.value: float = 0


class Histogram:
    """Counts of observations per bucket; `bounds` are the buckets' inclusive upper limits."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.documentation = documentation
        self.bounds = bounds
        self.sum = 0.0
        self._array = np.array(bounds, float)
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def observe_many(self, values: NDArray[np.float64]) -> None:
        """values: float64 [N]."""
        if len(values) == 0:
            return
        self.sum += float(values.sum())
        lowest = bisect_left(self.bounds, float(values.min()))
        if lowest == bisect_left(self.bounds, float(values.max())):  # as the times of one step mostly do
            self._counts[lowest] += len(values)
            return
        counts = np.bincount(np.searchsorted(self._array, values), minlength=len(self._counts))
        for bucket in counts.nonzero()[0].tolist():
            self._counts[bucket] += int(counts[bucket])

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper limit, observations at or below it), as Prometheus wants them."""
        limits = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        return list(zip(limits, np.cumsum(self._counts).tolist(), strict=True))

    @property
    def count(self) -> int:
        return sum(self._counts)
