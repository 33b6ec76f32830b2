"""How long the device worked on a step, and how long it had nothing to do before.

On the CPU the device is the compute thread, so its time is the host's. On a GPU the host only launches; events in the
stream take the time there, and whoever wants to know waits for them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Protocol

import torch

MAX_UINT32 = 2**32 - 1


@dataclass(frozen=True, slots=True)
class StepTime:
    device_us: int
    idle_us: int


class Reading(Protocol):
    """The time of one step, possibly still under way."""

    def wait(self) -> StepTime:
        """Blocks until the device is through with the step."""
        ...


class Clock:
    """The compute thread's clock for CPU steps."""

    def __init__(self) -> None:
        self._begin_ns = self._end_ns = perf_counter_ns()
        self._waited_ns = 0

    def begin(self) -> None:
        """A step starts."""
        self._begin_ns = perf_counter_ns()
        self._waited_ns = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the device waits for another rank: idle, not working."""
        since_ns = perf_counter_ns()
        yield
        self._waited_ns += perf_counter_ns() - since_ns

    def launches(self) -> None:
        """The plan is applied, and the device is given the step's work."""

    def end(self) -> Reading:
        """The step is over; everything that its reading is to wait for has been launched."""
        previous_end_ns, self._end_ns = self._end_ns, perf_counter_ns()
        idle_ns = self._begin_ns - previous_end_ns + self._waited_ns
        device_ns = self._end_ns - self._begin_ns - self._waited_ns
        return _KnownReading(StepTime(min(device_ns // 1000, MAX_UINT32), min(idle_ns // 1000, MAX_UINT32)))


class CudaClock(Clock):
    """The same by the GPU's own clock. A wait for another rank is part of the stream's work and counts as such.

    A step begins when the device reaches its first launches, not when the host takes up its plan: a device that waits
    for the host to apply a plan is idle. What the plan itself sends there, a few small copies, counts as idle, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._begin = self._end = self._event()

    def begin(self) -> None:
        pass

    @contextmanager
    def waiting(self) -> Iterator[None]:
        yield

    def launches(self) -> None:
        self._begin = self._event()

    def end(self) -> Reading:
        previous_end, self._end = self._end, self._event()
        return _CudaReading(previous_end, self._begin, self._end)

    @staticmethod
    def _event() -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


@dataclass(frozen=True, slots=True)
class _KnownReading:
    time: StepTime

    def wait(self) -> StepTime:
        return self.time


@dataclass(frozen=True, slots=True)
class _CudaReading:
    previous_end: torch.cuda.Event
    begin: torch.cuda.Event
    end: torch.cuda.Event

    def wait(self) -> StepTime:
        self.end.synchronize()
        idle_us = int(self.previous_end.elapsed_time(self.begin) * 1000)
        device_us = int(self.begin.elapsed_time(self.end) * 1000)
        return StepTime(min(device_us, MAX_UINT32), min(idle_us, MAX_UINT32))


def make_clock(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else Clock()
