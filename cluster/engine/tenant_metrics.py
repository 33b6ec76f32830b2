"""What each tenant has waiting and running, and what it was served, for Prometheus.

Every name is a label, and so a series for as long as Prometheus remembers it; there may be thousands of keys. Therefore
the busiest tenants have series of their own and all others one together. Who is among the busiest is looked at when
somebody reads: a tenant gets its name in place of one that has had far less since it was looked at last. What was
counted under a name stays there, so that no counter ever falls or jumps.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from manta.cluster.engine.histogram import REQUEST_S, Histogram

MAX_NAMED = 20
OTHERS = "_other"  # names of tenants begin with a letter or a digit
NAMELESS = "_none"  # requests without a key
_FADING = 0.5  # of what was served before, at each look
_ADVANTAGE = 2.0  # so many times what the least busy one was served, to take its place


class _Series:
    """The counters of one label."""

    def __init__(self) -> None:
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.queue_s = Histogram("manta:tenant_queue_time_seconds", "From arrival to the first slot.", REQUEST_S)


class TenantMetrics:
    """Tenants have numbers in the order in which they came."""

    def __init__(self, max_named: int = MAX_NAMED) -> None:
        self._max_named = max_named
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._labels: list[str] = []  # by number: what is counted under now
        self._num_waiting: list[int] = []  # by number
        self._num_running: list[int] = []
        self._num_prompt: list[int] = []  # by number: tokens since the last look
        self._num_generation: NDArray[np.int64] = np.zeros(0, np.int64)  # likewise
        self._recent: list[float] = []  # by number: tokens before that, faded
        self._series: dict[str, _Series] = {}

    def number(self, tenant: str) -> int:
        number = self._numbers.get(tenant)
        if number is None:
            number = self._numbers[tenant] = len(self._names)
            self._names.append(tenant)
            is_named = sum(label != OTHERS for label in self._labels) < self._max_named
            self._labels.append((tenant or NAMELESS) if is_named else OTHERS)
            self._series.setdefault(self._labels[number], _Series())
            for column in (self._num_waiting, self._num_running, self._num_prompt):
                column.append(0)
            self._recent.append(0.0)
            self._num_generation = np.append(self._num_generation, 0)
        return number

    def note_arrival(self, number: int) -> None:
        self._num_waiting[number] += 1

    def note_start(self, number: int, num_prompt_tokens: int, queue_s: float) -> None:
        """num_prompt_tokens: 0 for further samples of a prompt."""
        self._num_waiting[number] -= 1
        self._num_running[number] += 1
        self._num_prompt[number] += num_prompt_tokens
        self._series[self._labels[number]].queue_s.observe(queue_s)

    def note_end(self, number: int, *, has_started: bool) -> None:
        (self._num_running if has_started else self._num_waiting)[number] -= 1

    def note_tokens(self, numbers: NDArray[np.int64]) -> None:
        """A token for a request of each of `numbers`, int64 [N]."""
        if len(self._names) == 1:
            self._num_generation[0] += len(numbers)
        else:
            self._num_generation += np.bincount(numbers, minlength=len(self._names))

    def collect(self, model_name: str) -> Iterable[Metric]:
        """Metric families with the labels model_name and tenant."""
        self._look()
        names = ["model_name", "tenant"]
        waiting = GaugeMetricFamily("manta:tenant_requests_waiting", "Requests in the queue.", labels=names)
        running = GaugeMetricFamily("manta:tenant_requests_running", "Requests that began.", labels=names)
        prompt = CounterMetricFamily(
            "manta:tenant_prompt_tokens", "Prompt tokens, as vllm:prompt_tokens.", labels=names
        )
        generation = CounterMetricFamily("manta:tenant_generation_tokens", "Tokens generated.", labels=names)
        queue_s = HistogramMetricFamily(
            "manta:tenant_queue_time_seconds", "From arrival to the first slot.", labels=names
        )
        for label, series in self._series.items():
            numbers = [number for number, each in enumerate(self._labels) if each == label]
            labels = [model_name, label]
            waiting.add_metric(labels, sum(self._num_waiting[number] for number in numbers))
            running.add_metric(labels, sum(self._num_running[number] for number in numbers))
            prompt.add_metric(labels, series.num_prompt_tokens)
            generation.add_metric(labels, series.num_generation_tokens)
            queue_s.add_metric(labels, series.queue_s.cumulative(), series.queue_s.sum)
        return waiting, running, prompt, generation, queue_s

    def _look(self) -> None:
        """What was served goes to the labels under which it was, and then the busiest get their names."""
        for number, label in enumerate(self._labels):
            num_prompt, num_generation = self._num_prompt[number], int(self._num_generation[number])
            self._series[label].num_prompt_tokens += num_prompt
            self._series[label].num_generation_tokens += num_generation
            self._recent[number] = _FADING * self._recent[number] + num_prompt + num_generation
        self._num_prompt = [0] * len(self._names)
        self._num_generation[:] = 0
        while (swap := self._next_swap()) is not None:
            coming, going = swap
            del self._series[self._labels[going]]
            self._labels[going] = OTHERS
            self._labels[coming] = self._names[coming] or NAMELESS
            self._series[self._labels[coming]] = _Series()

    def _next_swap(self) -> tuple[int, int] | None:
        """Who gets a name, and who loses it."""
        others = [number for number, label in enumerate(self._labels) if label == OTHERS]
        named = [number for number, label in enumerate(self._labels) if label != OTHERS]
        if not others or not named:
            return None
        coming, going = max(others, key=self._recent.__getitem__), min(named, key=self._recent.__getitem__)
        return (coming, going) if self._recent[coming] > _ADVANTAGE * self._recent[going] else None
