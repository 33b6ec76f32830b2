"""How many replicas the load needs. A pure function of what it is shown, with a memory of since when."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from manta.cluster.launch.arrivals import Arrivals
from manta.configs.schema import ServeConfig
from manta.protos import engine_pb2 as pb

# A replica is meant to be filled to this share of its slots and KV blocks: what comes next finds room. It is taken away
# only when the others would not be filled beyond the lower one, so that the number does not swing.
UP_TO, DOWN_BELOW = 0.8, 0.5


@dataclass(frozen=True, slots=True)
class Sample:
    """The load at one moment."""

    at_s: float
    num_serving: int
    num_present: int  # serving and to stay, or on the way to it
    num_running: int
    num_waiting: int
    kv_usage: float  # of the replicas that serve, 0-1
    waiting_kv: float  # what the waiting prompts need, in KV pools of a replica
    oldest_wait_s: float
    num_arrived: int = 0  # requests, ever, modulo 2^32

    @classmethod
    def of(cls, load: pb.LoadResponse, at_s: float, block_size: int, jobs: Mapping[int, str] | None = None) -> Self:
        """jobs: replicas that are being brought up ("start") or taken away (anything else), whatever the load says."""
        jobs = jobs or {}
        states = [replica.state for index, replica in enumerate(load.replicas) if index not in jobs]
        num_serving = states.count(pb.ReplicaLoad.SERVING)
        num_coming = states.count(pb.ReplicaLoad.LOST) + list(jobs.values()).count("start")
        pool = max((replica.num_blocks for replica in load.replicas), default=0) * block_size
        return cls(
            at_s=at_s,
            num_serving=num_serving,
            num_present=num_serving + num_coming,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            kv_usage=load.kv_cache_usage,
            waiting_kv=load.num_waiting_tokens / pool if pool else 0.0,
            oldest_wait_s=load.oldest_wait_s,
            num_arrived=load.num_arrived,
        )


class Autoscaler:
    """`wanted` is shown a sample every so often. Up to what is needed in one go, once that has lasted upscale_delay_s;
    down one by one, each after downscale_delay_s in which it was not needed."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._up_since_s: float | None = None
        self._down_since_s: float | None = None
        self._arrivals = Arrivals()

    def wanted(self, sample: Sample) -> int:
        """The number of replicas there should be now, from min to max."""
        config, present = self._config, sample.num_present
        self._arrivals.observe(sample.at_s, sample.num_arrived, sample.num_running, sample.num_waiting)
        lowest, highest = config.min_num_replicas, config.max_num_replicas
        needed = self._needed(sample, UP_TO)
        is_late = sample.oldest_wait_s > config.ttft_target_s
        if is_late and sample.num_serving == present:  # who is on the way may suffice
            needed = max(needed, present + 1)
        needed = min(needed, highest)
        if needed > present:
            self._down_since_s = None
            self._up_since_s = sample.at_s if self._up_since_s is None else self._up_since_s
            is_time = sample.at_s - self._up_since_s >= config.upscale_delay_s
            return max(needed if is_time or not present else present, lowest)
        self._up_since_s = None
        if is_late or present <= lowest or self._needed(sample, DOWN_BELOW) >= present:
            self._down_since_s = None
            return max(min(present, highest), lowest)
        self._down_since_s = sample.at_s if self._down_since_s is None else self._down_since_s
        if sample.at_s - self._down_since_s < config.downscale_delay_s:
            return min(present, highest)
        self._down_since_s = None
        return present - 1

    def _needed(self, sample: Sample, fill: float) -> int:
        """Replicas that hold all there is, and all that will be if requests go on to arrive as they do, when each is
        filled to `fill`."""
        num_requests = max(sample.num_running + sample.num_waiting, self._arrivals.num_at_a_time)
        slots = num_requests / self._config.max_num_seqs
        pools = sample.kv_usage * sample.num_serving + sample.waiting_kv
        return math.ceil(max(slots, pools) / fill)
