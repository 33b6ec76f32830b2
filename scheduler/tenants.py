"""What each tenant was served, over all replicas: the virtual token counters of Sheng et al., "Fairness in Serving
Large Language Models", OSDI 2024. A prompt token that is computed counts 1 and a token of output 2, divided by the
weight of the tenant. What comes from the prefix cache costs nobody anything and counts nothing, and what a preempted
sequence computes again is not held against it.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

INPUT_COST = 1.0
OUTPUT_COST = 2.0


class TenantMeter:
    """Tenants get numbers as they come; there are as many as API keys name."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """weights: above 0; 1 for tenants that are not in it. Raises ValueError."""
        for tenant, weight in weights.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"tenant {tenant!r} has weight {weight}; weights must be above 0")
        self._weights = weights
        self._numbers: dict[str, int] = {}
        self.service: NDArray[np.float64] = np.zeros(0)  # by number
        self.num_running: list[int] = []  # sequences with slots, by number
        self._shares: NDArray[np.float64] = np.zeros(0)  # 1 / weight, by number

    def number(self, tenant: str) -> int:
        number = self._numbers.get(tenant)
        if number is None:
            number = self._numbers[tenant] = len(self._numbers)
            self.service = np.append(self.service, 0.0)
            self.num_running.append(0)
            self._shares = np.append(self._shares, 1 / self._weights.get(tenant, 1.0))
        return number

    def charge(self, tenant: str, num_input: int, num_output: int) -> None:
        number = self.number(tenant)
        self.service[number] += (INPUT_COST * num_input + OUTPUT_COST * num_output) * self._shares[number]

    def charge_rows(self, numbers: NDArray[np.intp]) -> None:
        """A token of output for each of `numbers`, which may be there several times."""
        counts = np.bincount(numbers, minlength=len(self.service))
        self.service += OUTPUT_COST * counts * self._shares

    def usage(self, tenant: str) -> float:
        """Sequences that run now, divided by the weight."""
        number = self.number(tenant)
        return float(self.num_running[number] * self._shares[number])

    def lift(self, number: int, level: float) -> None:
        """What a tenant did not ask for while it was away, it cannot claim later."""
        self.service[number] = max(self.service[number], level)
