"""What each tenant was served, over all replicas: the virtual token counters of Sheng et al., "Fairness in Serving
Large Language Models", OSDI 2024. A prompt token that is computed counts 1 and a token of output 2, divided by the
weight of the tenant. What comes from the prefix cache costs nobody anything and counts nothing, and what a preempted
sequence computes again is not held against it.

Beside the counters, which share throughput, stands what each was served lately. A tenant far below its share of that is
light: it cannot take much from the others, whatever is done for it, and so it is not made to wait for them.
"""

from collections.abc import Mapping
from math import exp

import numpy as np
from numpy.typing import NDArray

INPUT_COST = 1.0
OUTPUT_COST = 2.0
_LIGHT_SHARE = 0.25  # of its share: below that a tenant is light
_GONE = 0.01  # a tenant with less than so much served lately, of which nothing waits, is not there
_SMOOTHING = 0.1


class TenantMeter:
    """Tenants get numbers as they come; there are as many as API keys name."""

    def __init__(self, weights: Mapping[str, float], window: float = 1e5) -> None:
        """weights: above 0; 1 for tenants that are not in it. window: what was served is lately served until about so
        much more was. Raises ValueError."""
        for tenant, weight in weights.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"tenant {tenant!r} has weight {weight}; weights must be above 0")
        self._weights = weights
        self._window = window
        self._numbers: dict[str, int] = {}
        self.service: NDArray[np.float64] = np.zeros(0)  # by number
        self.num_running: list[int] = []  # sequences with slots, by number
        self._shares: NDArray[np.float64] = np.zeros(0)  # 1 / weight, by number
        self._recent: NDArray[np.float64] = np.zeros(0)  # by number: served lately, not divided by the weight
        self._prompts: NDArray[np.float64] = np.zeros(0)  # by number: mean length
        self._num_new = 0.0  # served since `classify`
        self.is_light: NDArray[np.bool_] = np.zeros(0, np.bool_)  # by number, as `classify` found
        self.light_prompt: float | None = None  # the shortest mean prompt of a light tenant; None if none is there

    def number(self, tenant: str) -> int:
        number = self._numbers.get(tenant)
        if number is None:
            number = self._numbers[tenant] = len(self._numbers)
            self.service = np.append(self.service, 0.0)
            self.num_running.append(0)
            self._shares = np.append(self._shares, 1 / self._weights.get(tenant, 1.0))
            self._recent = np.append(self._recent, 0.0)
            self._prompts = np.append(self._prompts, 0.0)
            self.is_light = np.append(self.is_light, False)
        return number

    def charge(self, tenant: str, num_input: int) -> None:
        """Tokens of a prompt."""
        number = self.number(tenant)
        self.service[number] += INPUT_COST * num_input * self._shares[number]
        self._recent[number] += INPUT_COST * num_input
        self._num_new += INPUT_COST * num_input

    def charge_rows(self, numbers: NDArray[np.intp]) -> None:
        """A token of output for each of `numbers`, which may be there several times."""
        costs = OUTPUT_COST * np.bincount(numbers, minlength=len(self.service))
        self.service += costs * self._shares
        self._recent += costs
        self._num_new += OUTPUT_COST * len(numbers)

    def usage(self, tenant: str) -> float:
        """Sequences that run now, divided by the weight."""
        number = self.number(tenant)
        return float(self.num_running[number] * self._shares[number])

    def lift(self, number: int, level: float) -> None:
        """What a tenant did not ask for while it was away, it cannot claim later."""
        self.service[number] = max(self.service[number], level)

    def note_arrival(self, number: int, num_tokens: int) -> None:
        """A request of a tenant has come, whose prompt has so many tokens."""
        mean = self._prompts[number]
        self._prompts[number] = mean + _SMOOTHING * (num_tokens - mean) if mean else num_tokens
        self._recent[number] = max(self._recent[number], INPUT_COST)  # it is there

    def classify(self) -> None:
        """Says anew who is light. A share is by weight, among the tenants that are there."""
        if self._num_new:
            self._recent *= exp(-self._num_new / self._window)
            self._num_new = 0.0
        is_there = self._recent > _GONE
        sum_weights = float((is_there / self._shares).sum())
        if not sum_weights:
            return
        per_weight = float(self._recent.sum()) / sum_weights
        self.is_light = self._recent * self._shares < _LIGHT_SHARE * per_weight
        prompts = self._prompts[self.is_light & is_there]
        self.light_prompt = float(prompts.min()) if len(prompts) else None
