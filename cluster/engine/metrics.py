"""What the engine counts, and its Prometheus text under the names of vLLM's dashboards."""

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from manta.cluster.engine.histogram import REQUEST_S, Counter, Histogram
from manta.cluster.engine.tenant_metrics import TenantMetrics

_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_TOKEN_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_STEP_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_OVERHEAD_S = (0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1)
_PLAN_BYTES = (32, 64, 128, 256, 512, 1024, 2048, 4096, 16384, 65536, 262144, 1048576)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
STATES = ("serving", "lost", "given_up", "absent")  # the protocol's ReplicaLoad.State
_FINISH_REASONS = ("stop", "length", "abort", "error")


class ReplicaMetrics:
    """Everything counted for one replica. Times in seconds."""

    def __init__(self) -> None:
        self.ttft_s = Histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", _TTFT_S)
        self.itl_s = Histogram("vllm:inter_token_latency_seconds", "Between two tokens of a request.", _TOKEN_S)
        self.tpot_s = Histogram("vllm:request_time_per_output_token_seconds", "Mean after the first token.", _TOKEN_S)
        self.e2e_s = Histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", REQUEST_S)
        self.queue_s = Histogram("vllm:request_queue_time_seconds", "From arrival to the first slot.", REQUEST_S)
        self.prefill_s = Histogram("vllm:request_prefill_time_seconds", "First slot to first token.", REQUEST_S)
        self.decode_s = Histogram("vllm:request_decode_time_seconds", "From the first token to the last.", REQUEST_S)
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
        self.recoveries = Counter("manta:recoveries", "A step came back, the first since a worker failed.")
        self.awaits_recovery = False
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
        self.state = ""


class EngineCollector(Collector):
    """Turns the replicas' counts into metric families when prometheus_client collects."""

    def __init__(
        self, model_name: str, replicas: list[ReplicaMetrics], tenants: TenantMetrics, cache_config: dict[str, str]
    ) -> None:
        self.num_moves: dict[str, int] = {}  # by how: sequences that went to another replica
        self.gauges = [Gauges() for _ in replicas]
        self._model_name = model_name
        self._replicas = replicas
        self._tenants = tenants
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
        yield self._states()
        yield self._finished()
        moves = CounterMetricFamily(
            "manta:sequence_moves", "Running sequences that went to another replica.", labels=["model_name", "how"]
        )
        for how, count in self.num_moves.items():
            moves.add_metric([self._model_name, how], count)
        yield moves
        yield from self._tenants.collect(self._model_name)
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

    def _states(self) -> Metric:
        labels = ["model_name", "engine", "state"]
        family = GaugeMetricFamily("manta:replica_state", "1 for the state that the replica is in.", labels=labels)
        for index, gauges in enumerate(self.gauges):
            for state in STATES:
                family.add_metric([*self._labels(index), state], int(gauges.state == state))
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
