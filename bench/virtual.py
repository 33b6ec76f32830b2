"""Replicas on a virtual clock: real schedulers, workers that only take time. Used by routing.py and fairness.py.

A step takes `step_s + token_s * tokens`, one after the other per replica, two plans in flight. An answer and the plan
that is made of it take `round_trip_s` together, which a device waits for that has no other plan.
"""

import heapq
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from manta.scheduler.scheduler import Scheduler
from manta.scheduler.types import Events, QueueFullError, Request, StepPlan, StepResult

LOOK_AGAIN_S = 0.05  # as the engine does for a replica that has left a request to another one


@dataclass(frozen=True, slots=True)
class StepTime:
    step_s: float = 0.005
    token_s: float = 25e-6
    round_trip_s: float = 0.0

    def of(self, num_tokens: int) -> float:
        return self.step_s + self.token_s * num_tokens


@dataclass(slots=True)
class Timeline:
    """Of one request, in seconds of the virtual clock."""

    arrival_s: float
    first_token_s: float = float("nan")
    end_s: float = float("nan")
    is_refused: bool = False  # the queue was full

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrival_s


@dataclass(frozen=True, slots=True)
class _Site:
    """A replica of one of the schedulers."""

    scheduler: Scheduler
    replica: int


@dataclass
class VirtualCluster:
    """`schedulers` have `num_replicas` replicas each; `bind` says which scheduler gets a request."""

    schedulers: list[Scheduler]
    num_replicas: int
    bind: Callable[[Request], int]
    step_time: StepTime
    timelines: dict[int, Timeline] = field(default_factory=dict)
    num_outstanding: list[int] = field(default_factory=list)  # requests, by scheduler
    now_s: float = 0.0
    plan_s: float = 0.0  # processor time of plans
    num_steps: int = 0
    num_tokens: int = 0  # in plans

    def __post_init__(self) -> None:
        self._sites = [_Site(scheduler, i) for scheduler in self.schedulers for i in range(self.num_replicas)]
        self._free_s = [0.0] * len(self._sites)
        self._looks_again = [False] * len(self._sites)
        self._home: dict[int, int] = {}  # request id -> scheduler
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self.num_outstanding = [0] * len(self.schedulers)

    def run(self, arrivals: list[tuple[float, Request]], until_s: float = float("inf")) -> None:
        """Until all have ended, or the clock has reached `until_s`."""
        for arrival_s, request in arrivals:
            self._at(arrival_s, lambda request=request: self._arrive(request))  # type: ignore[misc]
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, act = heapq.heappop(self._events)
            act()

    def _at(self, time_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), act))

    def _arrive(self, request: Request) -> None:
        self.timelines[request.id] = Timeline(self.now_s)
        chosen = self.bind(request)
        try:
            self.schedulers[chosen].add(request)
        except QueueFullError:
            self.timelines[request.id].is_refused = True
            return
        self._home[request.id] = chosen
        self.num_outstanding[chosen] += 1
        self._wake(chosen)

    def _wake(self, chosen: int) -> None:
        """The emptiest replica first, as the engine does."""
        sites = range(chosen * self.num_replicas, (chosen + 1) * self.num_replicas)
        for site in sorted(sites, key=lambda site: -self.schedulers[chosen].num_free_blocks(site % self.num_replicas)):
            self._plan(site)

    def _plan(self, index: int) -> None:
        site = self._sites[index]
        while (plan := self._timed_plan(site)) is not None:
            num_sampled = site.scheduler._replicas[site.replica].in_flight[-1].num_sampled
            begin_s = max(self.now_s + self.step_time.round_trip_s / 2, self._free_s[index])
            self._free_s[index] = begin_s + self.step_time.of(plan.num_tokens)
            result = StepResult(plan.epoch, plan.step, np.full(num_sampled, 3, np.int32))
            heard_s = self._free_s[index] + self.step_time.round_trip_s / 2
            self._at(heard_s, lambda result=result: self._answer(index, result))  # type: ignore[misc]
        if site.replica in site.scheduler.idle_replicas and not self._looks_again[index]:
            self._looks_again[index] = True
            self._at(self.now_s + LOOK_AGAIN_S, lambda: self._look_again(index))

    def _timed_plan(self, site: _Site) -> StepPlan | None:
        begin_s = time.thread_time()
        plan = site.scheduler.plan(site.replica)
        self.plan_s += time.thread_time() - begin_s
        self.num_steps += plan is not None
        self.num_tokens += 0 if plan is None else plan.num_tokens
        return plan

    def _look_again(self, index: int) -> None:
        self._looks_again[index] = False
        self._plan(index)

    def _answer(self, index: int, result: StepResult) -> None:
        site = self._sites[index]
        self._hear(site.scheduler.apply(result, site.replica))
        self._plan(index)
        for other in site.scheduler.idle_replicas:
            self._plan(index - site.replica + other)

    def _hear(self, events: Events) -> None:
        for request_id in events.request_ids.tolist():
            timeline = self.timelines[request_id]
            if timeline.first_token_s != timeline.first_token_s:
                timeline.first_token_s = self.now_s
        for finished in events.finished:
            self.timelines[finished.request.id].end_s = self.now_s
            self.num_outstanding[self._home.pop(finished.request.id)] -= 1
