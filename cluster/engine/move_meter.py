"""Measures what copying and computing cost, for the rule by which sequences move (`scheduler/move_cost.py`)."""

from dataclasses import dataclass

from manta.scheduler.move_cost import MoveFigures

_KEPT = 0.9  # of what was seen, each time that more is
_OVERHEAD_S = 0.004  # of a call to another worker and of joining there
_LEAST_PREFILL = 16  # tokens of prompts in a step, and
_PREFILL_PER_DECODE = 4  # so many for each decode row: its time is that of the prompts


@dataclass(slots=True)
class Rate:
    """An exponentially weighted average of amounts per second. It begins with a guess, soon outweighed."""

    amount: float
    seconds: float

    def observe(self, amount: float, seconds: float) -> None:
        self.amount = _KEPT * self.amount + amount
        self.seconds = _KEPT * self.seconds + seconds

    @property
    def per_s(self) -> float:
        return self.amount / self.seconds


class MoveMeter:
    """One for all replicas: these have equal workers."""

    def __init__(self, block_bytes: int) -> None:
        """block_bytes: of a KV block, on the rank that holds most of it."""
        self._block_bytes = block_bytes
        self._copying = Rate(amount=2.5e5, seconds=1e-3)
        self._prefilling = Rate(amount=2.0, seconds=1e-3)

    def observe_copy(self, num_bytes: int, took_s: float) -> None:
        """A rank has copied so much."""
        if num_bytes:
            self._copying.observe(num_bytes, max(took_s - _OVERHEAD_S, 1e-6))

    def observe_step(self, num_prefill: int, num_decodes: int, device_s: float) -> None:
        """A step computed so many tokens of prompts and so many decode rows."""
        if num_prefill >= max(_LEAST_PREFILL, _PREFILL_PER_DECODE * num_decodes) and device_s > 0:
            self._prefilling.observe(num_prefill, device_s)

    def figures(self) -> MoveFigures:
        return MoveFigures(self._block_bytes, self._copying.per_s, _OVERHEAD_S, self._prefilling.per_s)
