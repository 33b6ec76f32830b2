"""What the workers of a replica ask of Ray, and which of them share a node. Of numbers alone: Ray is not asked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manta.cluster.launch.launcher import LaunchError, cores_per_worker, cpu_worker_env
from manta.configs.resources import read_resources
from manta.configs.schema import ServeConfig

_GPU_CPUS = 1.0  # of a worker with a GPU
_STEPS = 1000  # Ray counts CPUs in ten-thousandths


@dataclass(frozen=True, slots=True)
class Placement:
    """Of one replica; all replicas are alike."""

    worker: dict[str, float]  # Ray's resources of each
    env: dict[str, str]
    strategy: str  # of Ray's placement group
    num_bundles: int
    num_workers_in_bundle: int  # they share a node

    @property
    def bundles(self) -> list[dict[str, float]]:
        bundle = {name: amount * self.num_workers_in_bundle for name, amount in self.worker.items()}
        return [dict(bundle) for _ in range(self.num_bundles)]

    def bundle_of(self, rank: int) -> int:
        return rank // self.num_workers_in_bundle

    def no_room(self) -> str:
        """What to say when Ray has no room for a replica."""
        each = " and ".join(f"{name} {amount:g}" for name, amount in self.worker.items())
        number = self.num_bundles * self.num_workers_in_bundle
        workers = "a worker" if number == 1 else f"{number} workers"
        where = f", {self.num_workers_in_bundle} on a node" if self.num_workers_in_bundle > 1 else ""
        where += ", each stage on a node of its own" if self.strategy == "STRICT_SPREAD" else ""
        return f"Ray has no room for {workers} with {each}{where}; it is taken when nodes come or are free"


def plan_placement(config: ServeConfig, nodes: Sequence[Mapping[str, float]]) -> Placement:
    """nodes: what each node of the cluster has in all. Raises LaunchError when the replicas of the start cannot fit on
    the GPUs there are; nodes for more may come when they are asked for."""
    tp, pp = config.tensor_parallel_size, config.pipeline_parallel_size
    is_together = config.placement_strategy != "any"
    strategy = "STRICT_SPREAD" if config.placement_strategy == "spread" else "PACK"
    # A bundle is on one node whole. Of stages PACK alone might put ranks of each on both of two nodes.
    num_bundles, in_bundle = (pp, tp) if is_together else (pp * tp, 1)
    asked = read_resources(config.worker_resources)
    if config.device == "cuda" or (config.device == "auto" and sum(node.get("GPU", 0.0) for node in nodes) >= 1):
        _check_gpus(config, [int(node.get("GPU", 0.0)) for node in nodes])
        return Placement({"CPU": _GPU_CPUS, "GPU": 1.0} | asked, {}, strategy, num_bundles, in_bundle)
    cpus = [node["CPU"] for node in nodes if node.get("CPU")]
    if "CPU" in asked:
        threads = max(1, int(asked["CPU"]))
    else:
        num_workers, num_nodes = config.num_ranks * config.max_num_replicas, max(1, len(cpus))
        threads = cores_per_worker(int(sum(cpus)) // num_nodes, -(-num_workers // num_nodes))
        # More CPU workers than cores is slow but right: they share cores rather than wait for nodes that never come.
        asked["CPU"] = cpu_share(cpus, num_bundles * config.max_num_replicas, in_bundle)
    return Placement(asked, cpu_worker_env(threads), strategy, num_bundles, in_bundle)


def cpu_share(cpus: Sequence[float], num_bundles: int, num_workers_in_bundle: int) -> float:
    """The most of a CPU, 1 at most, that every worker can have when all bundles find a node. cpus: by node."""
    shares = {number / (num_workers_in_bundle * count) for number in cpus for count in range(1, num_bundles + 1)}
    for share in sorted((min(1.0, each) for each in shares), reverse=True):
        rounded = math.floor(share * _STEPS) / _STEPS
        if rounded and sum(int(number / (rounded * num_workers_in_bundle) + 1e-9) for number in cpus) >= num_bundles:
            return rounded
    return 0.0


def _check_gpus(config: ServeConfig, gpus: Sequence[int]) -> None:
    """gpus: by node. Raises LaunchError."""
    tp, pp = config.tensor_parallel_size, config.pipeline_parallel_size
    num_needed = config.num_ranks * config.num_replicas_at_start
    if sum(gpus) < num_needed:
        raise LaunchError(
            f"{num_needed} GPUs are needed and Ray has {sum(gpus)}; add nodes or lower the parallel sizes"
        )
    if config.placement_strategy == "any":
        return
    num_nodes = sum(number >= tp for number in gpus)
    if not num_nodes:
        raise LaunchError(
            f"the {tp} tensor-parallel ranks of a stage share a node and the largest has {max(gpus)} GPUs; lower "
            f"--tensor-parallel-size, or let them lie on several nodes with --placement-strategy any"
        )
    if config.placement_strategy == "spread" and num_nodes < pp:
        raise LaunchError(
            f"--placement-strategy spread needs {pp} nodes with {tp} GPUs, one a stage, and Ray has {num_nodes}; add "
            f"nodes or leave it out"
        )
    if config.placement_strategy == "pack" and sum(number // tp for number in gpus) < pp * config.num_replicas_at_start:
        raise LaunchError(
            f"{pp * config.num_replicas_at_start} stages of {tp} GPUs of one node are needed and Ray has room for "
            f"{sum(number // tp for number in gpus)}; add nodes or lower the parallel sizes"
        )
