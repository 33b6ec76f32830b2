"""The queue of the "fair" policy: the tenant that was served least comes first, with its requests in their order. Light
tenants (tenants.py) come before others."""

from collections import OrderedDict
from collections.abc import Container, Iterator

import numpy as np

from manta.scheduler.sequence import Sequence
from manta.scheduler.tenants import TenantMeter


class FairQueue:
    """Who lost its place in a replica comes before the others of its tenant, not before other tenants.

    A tenant that comes back is lifted to the least served of those that wait, or, where nobody waits, to the last that
    did: so no tenant that waits is more than a bounded amount of service behind another one (Sheng et al., 2024).
    """

    def __init__(self, meter: TenantMeter) -> None:
        self.is_tight = False  # few slots are left: only light tenants are next
        self._meter = meter
        self._waiting: list[OrderedDict[int, Sequence]] = []  # by tenant's number, then by request id
        self._tokens: list[int] = []  # by tenant's number
        self._gates = np.zeros(0)  # by tenant's number: infinite where nothing waits
        self._turns: list[int] = []  # by tenant's number: when one left the queue last
        self._num_left = 0
        self._last_left: int | None = None
        self._len = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[Sequence]:
        """Tenant after tenant, as if nobody were served meanwhile."""
        for number in self._order():
            yield from self._waiting[number].values()

    def peek(self) -> Sequence | None:
        if not self._len:
            return None
        if self.is_tight:
            return self.first(())
        levels = self._meter.service[: len(self._gates)] + self._gates
        if self._meter.light_prompt is not None:
            light = np.where(self._meter.is_light[: len(self._gates)], levels, np.inf)
            levels = light if np.isfinite(light).any() else levels
        number = int(levels.argmin())
        equal = np.flatnonzero(levels == levels[number])
        if len(equal) > 1:
            number = min(equal.tolist(), key=self._turns.__getitem__)
        return next(iter(self._waiting[number].values()))

    def first(self, passed: Container[Sequence]) -> Sequence | None:
        """The first that is not among those passed over."""
        is_light = self._meter.is_light
        for number in self._order():
            if self.is_tight and not is_light[number]:
                return None
            for sequence in self._waiting[number].values():
                if sequence not in passed:
                    return sequence
        return None

    def push(self, sequence: Sequence) -> None:
        number = self._number(sequence)
        if not self._waiting[number]:
            self._lift(number)
        self._meter.note_arrival(number, len(sequence.tokens))
        self._put(number, sequence)

    def push_front(self, sequence: Sequence) -> None:
        number = self._number(sequence)
        self._put(number, sequence)
        self._waiting[number].move_to_end(sequence.request.id, last=False)

    def remove(self, sequence: Sequence) -> None:
        number = self._number(sequence)
        del self._waiting[number][sequence.request.id]
        if not self._waiting[number]:
            self._gates[number] = np.inf
        self._tokens[number] -= len(sequence.tokens)
        self.num_tokens -= len(sequence.tokens)
        self._len -= 1
        self._num_left += 1
        self._turns[number] = self._num_left
        self._last_left = number

    def share_of(self, tenant: str) -> tuple[int, int, int]:
        """Requests and tokens of the tenant that wait, and how many tenants share the queue with it, itself counted."""
        number = self._meter.number(tenant)
        self._grow(number)
        num_others = int(np.count_nonzero(self._gates == 0)) - bool(self._waiting[number])
        return len(self._waiting[number]), self._tokens[number], num_others + 1

    def check(self) -> None:
        """Raises AssertionError if counts and sequences differ."""
        for number, sequences in enumerate(self._waiting):
            num_tokens = sum(len(sequence.tokens) for sequence in sequences.values())
            assert self._tokens[number] == num_tokens, f"tenant {number} has {num_tokens} tokens waiting"
            assert np.isinf(self._gates[number]) == (not sequences), f"the gate of tenant {number} is wrong"
            for sequence in sequences.values():
                assert self._meter.number(sequence.request.tenant) == number, "a sequence waits as another tenant's"
        assert self._len == sum(map(len, self._waiting)), "the fair queue has another length"

    def _put(self, number: int, sequence: Sequence) -> None:
        self._waiting[number][sequence.request.id] = sequence
        self._gates[number] = 0.0
        self._tokens[number] += len(sequence.tokens)
        self.num_tokens += len(sequence.tokens)
        self._len += 1

    def _lift(self, number: int) -> None:
        service = self._meter.service
        if self._len:
            self._meter.lift(number, float((service[: len(self._gates)] + self._gates).min()))
        elif self._last_left is not None:
            self._meter.lift(number, float(service[self._last_left]))

    def _order(self) -> list[int]:
        """Numbers of the tenants that wait: the light ones, and least served first."""
        meter = self._meter
        waiting = np.flatnonzero(self._gates == 0).tolist()
        return sorted(waiting, key=lambda n: (not meter.is_light[n], meter.service[n], self._turns[n]))

    def _number(self, sequence: Sequence) -> int:
        number = self._meter.number(sequence.request.tenant)
        if number >= len(self._waiting):
            self._grow(number)
        return number

    def _grow(self, number: int) -> None:
        while len(self._waiting) <= number:
            self._waiting.append(OrderedDict())
            self._tokens.append(0)
            self._turns.append(0)
            self._gates = np.append(self._gates, np.inf)
