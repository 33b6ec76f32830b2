"""What has failed how often, what is set aside for it, and until when. A pure book; whoever keeps it has a clock."""

from collections import deque
from dataclasses import dataclass

from manta.cluster.launch.launcher import Part

WITHIN_S = 60.0  # so many failures as the limit says within this time are too many
FIRST_REST_S, LONGEST_REST_S = 60.0, 1800.0  # a part that is given up rests; twice as long each time
_FORGET_S = 1800.0  # after a rest: whoever has done well for so long rests as briefly as at first


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A part that is not started again before its time has come."""

    reason: str
    until_s: float
    rest_s: float


class Failures:
    """Of all parts of a deployment. `now_s` is any clock that does not go back."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._failed_s: dict[Part, deque[float]] = {}
        self._last: dict[Part, GivenUp] = {}
        self.given_up: dict[Part, GivenUp] = {}

    def add(self, part: Part, now_s: float) -> bool:
        """A part has failed that served; whether that was too often."""
        times = self._failed_s.setdefault(part, deque(maxlen=self._limit))
        times.append(now_s)
        return len(times) == self._limit and times[-1] - times[0] <= WITHIN_S

    def how_often(self) -> str:
        """What to add to the reason of a part that has failed too often."""
        return f" ({self._limit} times within {WITHIN_S:.0f} s)" if self._limit > 1 else ""

    def give_up(self, part: Part, reason: str, now_s: float) -> GivenUp:
        """Sets a part aside for a while, longer than the last time if that was not long ago."""
        last = self._last.get(part)
        is_again = last is not None and now_s - last.until_s <= _FORGET_S
        rest_s = min(2 * last.rest_s, LONGEST_REST_S) if last is not None and is_again else FIRST_REST_S
        given_up = self.given_up[part] = self._last[part] = GivenUp(reason, now_s + rest_s, rest_s)
        self._failed_s.pop(part, None)
        return given_up

    def serves(self, part: Part) -> None:
        """A part that was given up serves again."""
        self.given_up.pop(part, None)

    def rested(self, now_s: float) -> list[Part]:
        """Parts whose time has come."""
        return [part for part, each in self.given_up.items() if each.until_s <= now_s]
