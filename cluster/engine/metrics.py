"""What the engine counts, and its Prometheus text under the names of vLLM's dashboards.

prometheus_client takes microseconds per observation; a step observes hundreds of values. The engine therefore counts in
its own few lines, a whole array at a time, and hands prometheus_client the sums when somebody asks.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_STEP_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_OVERHEAD_S = (0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1)
_PLAN_BYTES = (32, 64, 128, 256, 512, 1024, 2048, 4096, 16384, 65536, 262144, 1048576)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_FINISH_REASONS = ("stop", "length", "abort", "error")


class Counter:
    """A number that only grows. `name` without the _total that Prometheus appends."""

    def __init__(self, name: str, documentation: str) -> None:
        self.name = name
        self.documentation = documentation
        self.value: float = 0


class Histogram:
    """Counts of observations per bucket; `bounds` are the buckets' inclusive upper limits."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.documentation = documentation
        self.bounds = bounds
        self.sum = 0.0
        self._array = np.array(bounds, float)
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def observe_many(self, values: NDArray[np.float64]) -> None:
        """values: float64 [N]."""
        if len(values) == 0:
            return
        self.sum += float(values.sum())
        lowest = bisect_left(self.bounds, float(values.min()))
        if lowest == bisect_left(self.bounds, float(values.max())):  # as the times of one step mostly do
            self._counts[lowest] += len(values)
            return
        counts = np.bincount(np.searchsorted(self._array, values), minlength=len(self._counts))
        for bucket in counts.nonzero()[0].tolist():
            self._counts[bucket] += int(counts[bucket])

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper limit, observations at or below it), as Prometheus wants them."""
        limits = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        return list(zip(limits, np.cumsum(self._counts).tolist(), strict=True))

    @property
    def count(self) -> int:
        return sum(self._counts)


class ReplicaMetrics:
    """Everything counted for one replica. Times in seconds."""

    def __init__(self) -> None:
        self.ttft_s = Histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", _TTFT_S)
        self.itl_s = Histogram("vllm:inter_token_latency_seconds", "Between two tokens of a request.", _TOKEN_S)
        self.tpot_s = Histogram("vllm:request_time_per_output_token_seconds", "Mean after the first token.", _TOKEN_S)
        self.e2e_s = Histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", _REQUEST_S)
        self.queue_s = Histogram("vllm:request_queue_time_seconds", "From arrival to the first slot.", _REQUEST_S)
        self.prefill_s = Histogram("vllm:request_prefill_time_seconds", "First slot to first token.", _REQUEST_S)
        self.decode_s = Histogram("vllm:request_decode_time_seconds", "From the first token to the last.", _REQUEST_S)
        self.request_prompt_tokens = Histogram("vllm:request_prompt_tokens", "Prompt length.", _TOKENS)
        self.request_generation_tokens = Histogram("vllm:request_generation_tokens", "Tokens generated.", _TOKENS)
        self.step_s = Histogram("manta:step_time_seconds", "Between two results of a busy replica.", _STEP_S)
        self.dispatch_latency_s = Histogram(
            "manta:dispatch_latency_seconds", "Plan sent to result received, less device time.", _OVERHEAD_S
        )
        self.scheduler_cpu_s = Histogram("manta:scheduler_cpu_seconds", "What a step costs this process.", _OVERHEAD_S)
        self.plan_bytes = Histogram("manta:plan_bytes", "Size of one encoded step plan.", _PLAN_BYTES)
        self.prompt_tokens = Counter("vllm:prompt_tokens", "Prompt tokens of requests that got a slot.")
        self.generation_tokens = Counter("vllm:generation_tokens", "Tokens generated.")
        self.prefix_cache_queries = Counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.prefix_cache_hits = Counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.preemptions = Counter("vllm:num_preemptions", "Sequences that lost their blocks and waited again.")
        self.device_busy_s = Counter("manta:device_busy_seconds", "The device worked on steps.")
        self.device_idle_s = Counter("manta:device_idle_seconds", "The device waited for a step while there was work.")
        self.failovers = Counter("manta:failovers", "Epochs ended by a worker's failure.")
        self.finished = dict.fromkeys(_FINISH_REASONS, 0)
        self._idle_share = 0.0

    def observe_device(self, device_us: int, idle_us: int) -> None:
        """One step's time on the device and the wait before it."""
        self.device_busy_s.value += device_us * 1e-6
        self.device_idle_s.value += idle_us * 1e-6
        if device_us + idle_us:
            share = idle_us / (device_us + idle_us)
            self._idle_share += 0.01 * (share - self._idle_share)

    @property
    def idle_share(self) -> float:
        """Idle part of the device's time, 0-1, smoothed over the last hundred steps or so."""
        return self._idle_share

    def series(self) -> Iterable[Counter | Histogram]:
        return (value for value in vars(self).values() if isinstance(value, Counter | Histogram))


class Gauges:
    """What is read from the scheduler at scrape time, per replica."""

    def __init__(self) -> None:
        self.num_running = 0
        self.num_waiting = 0
        self.kv_cache_usage = 0.0
        self.alive = True


class EngineCollector(Collector):
    """Turns the replicas' counts into metric families when prometheus_client collects."""

    def __init__(self, model_name: str, replicas: list[ReplicaMetrics], cache_config: dict[str, str]) -> None:
        self.gauges = [Gauges() for _ in replicas]
        self._model_name = model_name
        self._replicas = replicas
        self._cache_config = cache_config

    def collect(self) -> Iterable[Metric]:
        """One family per name, one sample per replica (label `engine`)."""
        for replicas in zip(*(replica.series() for replica in self._replicas), strict=True):
            yield self._family(replicas)
        yield self._gauge("vllm:num_requests_running", "Requests in a slot.", [g.num_running for g in self.gauges])
        yield self._gauge("vllm:num_requests_waiting", "Requests in the queue.", [g.num_waiting for g in self.gauges])
        usage = [gauge.kv_cache_usage for gauge in self.gauges]
        yield self._gauge("vllm:kv_cache_usage_perc", "KV blocks in use, 0-1.", usage)
        shares = [replica.idle_share for replica in self._replicas]
        yield self._gauge("manta:device_idle_share", "Idle part of the device's time, 0-1, recent.", shares)
        yield self._gauge("manta:replica_up", "1 while the replica serves.", [int(g.alive) for g in self.gauges])
        yield self._finished()
        info = GaugeMetricFamily("vllm:cache_config_info", "KV cache of a replica.", labels=[*self._cache_config])
        info.add_metric([*self._cache_config.values()], 1)
        yield info

    def _labels(self, index: int) -> list[str]:
        return [self._model_name, str(index)]

    def _family(self, replicas: tuple[Counter | Histogram, ...]) -> Metric:
        first = replicas[0]
        labels = ["model_name", "engine"]
        if isinstance(first, Counter):
            counter = CounterMetricFamily(first.name, first.documentation, labels=labels)
            for index, series in enumerate(replicas):
                if isinstance(series, Counter):
                    counter.add_metric(self._labels(index), series.value)
            return counter
        histogram = HistogramMetricFamily(first.name, first.documentation, labels=labels)
        for index, series in enumerate(replicas):
            if isinstance(series, Histogram):
                histogram.add_metric(self._labels(index), series.cumulative(), series.sum)
        return histogram

    def _gauge(self, name: str, documentation: str, values: Sequence[float]) -> Metric:
        family = GaugeMetricFamily(name, documentation, labels=["model_name", "engine"])
        for index, value in enumerate(values):
            family.add_metric(self._labels(index), value)
        return family

    def _finished(self) -> Metric:
        labels = ["model_name", "engine", "finished_reason"]
        family = CounterMetricFamily("vllm:request_success", "Requests that ended, by reason.", labels=labels)
        for index, replica in enumerate(self._replicas):
            for reason, count in replica.finished.items():
                family.add_metric([*self._labels(index), reason], count)
        return family


def render(collector: EngineCollector) -> bytes:
    """Prometheus exposition format."""
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry)
