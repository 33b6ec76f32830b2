"""What the engine tells of itself: information, load and metrics."""

from manta.cluster.engine.bringup import Deployment
from manta.cluster.engine.metrics import EngineCollector, ReplicaMetrics, render
from manta.cluster.engine.publisher import Publisher
from manta.cluster.engine.replica import ReplicaLoop
from manta.cluster.engine.types import BACKGROUND
from manta.configs.schema import ServeConfig
from manta.protos import engine_pb2 as pb
from manta.scheduler.scheduler import Scheduler


class Reporter:
    """Looks at what the engine owns, which changes meanwhile. given_up: replicas that nobody will bring back, and
    why."""

    def __init__(
        self,
        config: ServeConfig,
        deployment: Deployment,
        scheduler: Scheduler,
        publisher: Publisher,
        metrics: list[ReplicaMetrics],
        loops: list[ReplicaLoop],
        given_up: dict[int, str],
    ) -> None:
        self._config = config
        self._deployment = deployment
        self._scheduler = scheduler
        self._publisher = publisher
        self._metrics = metrics
        self._loops = loops
        self._given_up = given_up
        self._collector = EngineCollector(
            config.model_name, metrics, publisher.tenants, _cache_config(config, deployment)
        )

    def info(self) -> pb.InfoResponse:
        capacity = self._deployment.capacities[0]
        return pb.InfoResponse(
            config_json=self._config.model_dump_json(),
            num_blocks=min(capacity.num_blocks for capacity in self._deployment.capacities),
            block_size=capacity.block_size,
            max_model_len=capacity.max_model_len,
            device=self._deployment.device,
            weight_bytes=self._deployment.weight_bytes,
            bytes_per_block=self._deployment.bytes_per_block,
            startup_s=self._deployment.startup_s,
            num_replicas=self._config.num_replicas_at_start,
        )

    def load(self, draining: bool, num_held: int) -> pb.LoadResponse:
        """num_held: requests that wait for something else than room; a replica must not go meanwhile."""
        replicas = [self._load_of(loop) for loop in self._loops]
        lost = [f"replica {index}: {each.detail}" for index, each in enumerate(replicas) if each.detail]
        is_served = any(each.state == pb.ReplicaLoad.SERVING and not each.detail for each in replicas)
        num_blocks = sum(each.num_blocks for each in replicas)
        num_free = sum(each.num_free_blocks for each in replicas)
        return pb.LoadResponse(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting + num_held,
            num_free_blocks=num_free,
            num_blocks=num_blocks,
            kv_cache_usage=1.0 - num_free / num_blocks if num_blocks else 0.0,
            num_waiting_tokens=self._scheduler.num_waiting_tokens,
            healthy=is_served or self._may_be_idle(replicas),
            detail="; ".join(lost) or ("draining" if draining else ""),
            num_background=self._scheduler.num_of_priority(BACKGROUND),
            replicas=replicas,
            oldest_wait_s=self._oldest_wait_s(),
            num_arrived=self._publisher.num_arrived % 2**32,
        )

    def _may_be_idle(self, replicas: list[pb.ReplicaLoad]) -> bool:
        """Without any replica all is well only where that is as it should be, and one can come."""
        states = {each.state for each in replicas}
        is_quiet = states <= {pb.ReplicaLoad.ABSENT, pb.ReplicaLoad.GIVEN_UP} and pb.ReplicaLoad.ABSENT in states
        return is_quiet and self._config.min_num_replicas == 0

    def _oldest_wait_s(self) -> float:
        arrival_s = self._scheduler.first_arrival_s()
        return 0.0 if arrival_s is None else self._publisher.clock() - arrival_s

    def _load_of(self, loop: ReplicaLoop) -> pb.ReplicaLoad:
        if loop.index in self._given_up:
            return pb.ReplicaLoad(state=pb.ReplicaLoad.GIVEN_UP, detail=self._given_up[loop.index])
        num_excused = self._scheduler.num_excused(loop.index)
        if not loop.group.addresses:
            return pb.ReplicaLoad(state=pb.ReplicaLoad.ABSENT)
        if loop.lost_reason is not None:
            return pb.ReplicaLoad(state=pb.ReplicaLoad.LOST, detail=loop.lost_reason, num_excused=num_excused)
        has_work = self._scheduler.num_running or self._scheduler.num_waiting
        return pb.ReplicaLoad(
            detail=loop.trouble if loop.trouble and has_work else "",  # work waits, and no step has come back since
            num_free_blocks=self._scheduler.num_free_blocks(loop.index),
            num_blocks=self._deployment.capacities[loop.index].num_blocks,
            num_running=self._scheduler.num_resident(loop.index),
            num_excused=num_excused,
        )

    def metrics_text(self) -> bytes:
        """Prometheus exposition format."""
        self._publisher.settle()
        for loop in self._loops:
            loop.settle()
        for loop, gauges in zip(self._loops, self._collector.gauges, strict=True):
            num_blocks = self._deployment.capacities[loop.index].num_blocks
            gauges.kv_cache_usage = 1.0 - self._scheduler.num_free_blocks(loop.index) / num_blocks
            gauges.num_running = self._scheduler.num_resident(loop.index)
            gauges.alive = loop.lost_reason is None
            gauges.state = pb.ReplicaLoad.State.Name(self._load_of(loop).state).lower()
        self._share_out(self._scheduler.num_waiting)
        counters = self._scheduler.counters
        self._collector.num_moves = {
            "copied": counters.num_moves_copied,
            "recomputed": counters.num_moves_recomputed,
            "failed": counters.num_moves_failed,
        }
        return render(self._collector)

    def _share_out(self, num_waiting: int) -> None:
        """The replicas have one queue. Each that serves is given an equal part of it, so that sums and means over
        replicas are right."""
        gauges = self._collector.gauges
        serving = [each for each in gauges if each.alive] or gauges[:1]
        for each in gauges:
            each.num_waiting = 0
        for place, each in enumerate(serving):
            each.num_waiting = (num_waiting + len(serving) - 1 - place) // len(serving)


def _cache_config(config: ServeConfig, deployment: Deployment) -> dict[str, str]:
    capacity = deployment.capacities[0]
    return {
        "block_size": str(capacity.block_size),
        "num_gpu_blocks": str(capacity.num_blocks),
        "enable_prefix_caching": str(config.enable_prefix_caching),
        "gpu_memory_utilization": str(config.gpu_memory_utilization),
        "num_gpu_blocks_override": str(config.num_gpu_blocks_override),
    }
