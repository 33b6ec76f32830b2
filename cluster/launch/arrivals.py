"""How many requests run at a time on average, told from how they arrive and end."""

import math
from dataclasses import dataclass

WINDOW_S = 15.0  # of which the rates are averages, newer seconds counting more
_FIRST_S = 5.0  # before this long nothing is told of rates
_COUNTS = 1 << 32  # a count of arrivals starts again here


@dataclass(slots=True)
class Arrivals:
    """By Little's law: as many are there at a time as arrive within the time that one takes. So the moment between two
    bursts is not taken for the end of the load."""

    at_s: float | None = None
    _num_arrived: int = 0
    _num_there: int = 0
    _arrived: float = 0.0  # sums that fade
    _ended: float = 0.0
    _running_s: float = 0.0
    _seconds: float = 0.0

    def observe(self, at_s: float, num_arrived: int, num_running: int, num_waiting: int) -> None:
        """num_arrived: ever, modulo 2^32; a scheduler that takes another one's place begins at 0."""
        there = num_running + num_waiting
        last_s, arrived = self.at_s, (num_arrived - self._num_arrived) % _COUNTS
        ended = arrived + self._num_there - there
        self.at_s, self._num_arrived, self._num_there = at_s, num_arrived, there
        if last_s is None or at_s <= last_s or arrived > _COUNTS // 2:
            return
        took_s = at_s - last_s
        kept = math.exp(-took_s / WINDOW_S)
        self._arrived = kept * self._arrived + arrived
        self._ended = kept * self._ended + max(ended, 0)
        self._running_s = kept * self._running_s + num_running * took_s
        self._seconds = kept * self._seconds + took_s

    @property
    def per_s(self) -> float:
        """Requests that arrive in a second."""
        return self._arrived / self._seconds if self._seconds >= _FIRST_S else 0.0

    @property
    def takes_s(self) -> float:
        """Seconds that a request runs; 0 while none has ended."""
        return self._running_s / self._ended if self._ended >= 1.0 else 0.0

    @property
    def num_at_a_time(self) -> float:
        """Requests that will run at a time if they go on to arrive as they did."""
        return self.per_s * self.takes_s
