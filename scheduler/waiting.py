"""The queue of sequences without a replica, in the order in which they are admitted."""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Container, Iterator
from typing import Protocol

from manta.scheduler.sequence import Sequence


class WaitingQueue(Protocol):
    num_tokens: int  # of all waiting sequences together

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Sequence]: ...
    def peek(self) -> Sequence | None: ...
    def first(self, passed: Container[Sequence]) -> Sequence | None: ...
    def push(self, sequence: Sequence) -> None: ...
    def push_front(self, sequence: Sequence) -> None: ...
    def remove(self, sequence: Sequence) -> None: ...
    def share_of(self, tenant: str) -> tuple[int, int, int]:
        """What limits of the queue count for a request of that tenant: requests, tokens, and how many tenants share."""
        ...


class FcfsQueue:
    """First come, first served; who lost its place in a replica comes before all who had none yet."""

    def __init__(self) -> None:
        self._sequences: OrderedDict[int, Sequence] = OrderedDict()
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    def peek(self) -> Sequence | None:
        return next(iter(self._sequences.values()), None)

    def first(self, passed: Container[Sequence]) -> Sequence | None:
        """The first that is not among those passed over."""
        return next((sequence for sequence in self if sequence not in passed), None)

    def share_of(self, tenant: str) -> tuple[int, int, int]:
        return len(self), self.num_tokens, 1

    def push(self, sequence: Sequence) -> None:
        self._sequences[sequence.request.id] = sequence
        self.num_tokens += len(sequence.tokens)

    def push_front(self, sequence: Sequence) -> None:
        self.push(sequence)
        self._sequences.move_to_end(sequence.request.id, last=False)

    def remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request.id]
        self.num_tokens -= len(sequence.tokens)


class PriorityQueue:
    """Lower priority value first, then first come. A sorted list: moving 8 bytes per waiting request is quicker than
    the bookkeeping of a heap that things can be removed from."""

    def __init__(self) -> None:
        self._keys: list[tuple[int, int]] = []
        self._sequences: dict[tuple[int, int], Sequence] = {}
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Sequence]:
        return (self._sequences[key] for key in self._keys)

    def peek(self) -> Sequence | None:
        return self._sequences[self._keys[0]] if self._keys else None

    def first(self, passed: Container[Sequence]) -> Sequence | None:
        """The first that is not among those passed over."""
        return next((sequence for sequence in self if sequence not in passed), None)

    def share_of(self, tenant: str) -> tuple[int, int, int]:
        return len(self), self.num_tokens, 1

    def push(self, sequence: Sequence) -> None:
        key = (sequence.request.priority, sequence.arrival)
        insort(self._keys, key)
        self._sequences[key] = sequence
        self.num_tokens += len(sequence.tokens)

    def push_front(self, sequence: Sequence) -> None:
        """Its arrival already puts it before the later ones of its priority."""
        self.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        key = (sequence.request.priority, sequence.arrival)
        del self._keys[bisect_left(self._keys, key)]
        del self._sequences[key]
        self.num_tokens -= len(sequence.tokens)
