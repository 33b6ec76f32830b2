"""Ray actors in placement groups: how a cluster runs Manta."""

import contextlib
import logging
import socket
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from manta.cluster.launch.actors import FrontendActor, SchedulerActor, WorkerActor
from manta.cluster.launch.launcher import (
    Death,
    FrontendAddress,
    LaunchError,
    cores_per_worker,
    cpu_worker_env,
    ray_address,
)
from manta.configs.schema import ServeConfig

_CONNECT_TIMEOUT_S = 5.0
_ACTOR_TIMEOUT_S = 120.0
_LOAD_TIMEOUT_S = 3600.0
_END_TIMEOUT_S = 5.0

# A restarted actor would be empty and answer wrongly; bringing up a new one is the launcher's business.
_ACTOR_OPTIONS = {"max_restarts": 0, "max_task_retries": 0}
_WORKER = ray.remote(**_ACTOR_OPTIONS, max_concurrency=4)(WorkerActor)
_SCHEDULER = ray.remote(**_ACTOR_OPTIONS)(SchedulerActor)
_FRONTEND = ray.remote(**_ACTOR_OPTIONS)(FrontendActor)
_OBJECT_STORE_BYTES = 128 * 2**20  # nothing but actor arguments passes through it


def connect(config: ServeConfig) -> None:
    """Joins the cluster at --ray-address or RAY_ADDRESS, or starts one here. Raises LaunchError."""
    address = ray_address(config)
    if address:
        _check_reachable(address)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": True}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        what = f"no Ray cluster at {address!r} can be joined" if address else "a local Ray cannot be started"
        raise LaunchError(f"{what}: {_first_line(error)}") from None


def _check_reachable(address: str) -> None:
    """Raises LaunchError at once where ray.init would wait for minutes. "auto" is for Ray itself to resolve."""
    if "://" in address:
        raise LaunchError(f"Ray address {address!r} is a URL; give host:port of the head node, such as 127.0.0.1:6379")
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise LaunchError(f"no Ray cluster at {address!r} can be joined: {error.strerror or error}") from None


class RayLauncher:
    """Owns the actors and placement groups it creates. Ray must be connected."""

    def __init__(self) -> None:
        self._groups: list[PlacementGroup] = []
        self._workers: list[Any] = []
        self._scheduler: Any = None
        self._frontends: list[Any] = []
        self._prepared: list[Any] = []
        self._lifelines: dict[Any, tuple[str, int | None]] = {}  # never-ending call of an actor -> its name, replica

    def start_workers(self, config: ServeConfig) -> list[list[str]]:
        bundle, env = _worker_needs(config)
        ranks = config.num_ranks
        for _ in range(config.data_parallel_size):
            group = placement_group([bundle] * ranks, strategy="PACK")
            self._groups.append(group)
            if not group.wait(timeout_seconds=_ACTOR_TIMEOUT_S):
                raise LaunchError(
                    f"Ray found no room for {ranks} workers with {bundle} each; add nodes or lower the sizes"
                )
            for rank in range(ranks):
                self._workers.append(
                    _WORKER.options(
                        num_cpus=bundle["CPU"],
                        num_gpus=bundle.get("GPU", 0),
                        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
                        runtime_env={"env_vars": env},
                    ).remote()
                )
        for number, worker in enumerate(self._workers):
            self._lifelines[worker.stay.remote()] = (f"worker {number}", number // ranks)
        addresses = _get([worker.start.remote() for worker in self._workers], _ACTOR_TIMEOUT_S, "the workers")
        return [addresses[i : i + ranks] for i in range(0, len(addresses), ranks)]

    def start_scheduler(self, config: ServeConfig, workers: list[list[str]]) -> str:
        self._scheduler = _SCHEDULER.options(num_cpus=0, scheduling_strategy=_here()).remote()
        self._lifelines[self._scheduler.stay.remote()] = ("the scheduler", None)
        call = self._scheduler.start.remote(config.model_dump_json(), workers)
        address: str = _get(call, _LOAD_TIMEOUT_S, "the scheduler")
        return address

    def prepare_frontends(self, config: ServeConfig) -> None:
        for index in range(config.api_server_count):
            actor = _FRONTEND.options(num_cpus=0, scheduling_strategy=_here()).remote()
            self._frontends.append(actor)
            self._lifelines[actor.stay.remote()] = (f"frontend {index}", None)
            self._prepared.append(actor.prepare.remote(config.model_dump_json(), list(config.api_key)))

    def open_frontends(self, config: ServeConfig, scheduler: str) -> FrontendAddress:
        _get(self._prepared, _ACTOR_TIMEOUT_S, "the frontends")
        address = FrontendAddress(config.port, config.grpc_port)
        for actor in self._frontends:
            call = actor.start.remote(scheduler, address.http_port, address.grpc_port)
            address = FrontendAddress(*_get(call, _ACTOR_TIMEOUT_S, "a frontend"))
        return address

    def deaths(self) -> list[Death]:
        ended, _ = ray.wait(list(self._lifelines), num_returns=len(self._lifelines), timeout=0)
        return [self._death(call) for call in ended]

    def _death(self, call: Any) -> Death:
        name, replica = self._lifelines[call]
        try:
            ray.get(call, timeout=1)
        except RayTaskError as error:  # of an actor that lives and says itself what is wrong
            return Death(_first_line(error.cause), replica)
        except RayError as error:
            return Death(f"{name} has died: {_first_line(error)}", replica)
        return Death(f"{name} has ended", replica)

    def stop(self, grace_s: float) -> None:
        self._lifelines.clear()
        with contextlib.suppress(RayError):
            ray.get([frontend.stop.remote(grace_s) for frontend in self._frontends], timeout=grace_s + _END_TIMEOUT_S)
        if self._scheduler is not None:
            with contextlib.suppress(RayError):
                ray.get(self._scheduler.stop.remote(), timeout=_END_TIMEOUT_S)
        scheduler = [] if self._scheduler is None else [self._scheduler]
        for actor in [*self._frontends, *scheduler, *self._workers]:
            ray.kill(actor)
        for group in self._groups:
            ray.util.remove_placement_group(group)
        self._frontends, self._scheduler, self._workers, self._groups = [], None, [], []


def has_gpus() -> bool:
    """Whether the cluster has GPUs at all."""
    return bool(ray.cluster_resources().get("GPU", 0))


def _worker_needs(config: ServeConfig) -> tuple[dict[str, float], dict[str, str]]:
    """The resources of one worker and its environment. Raises LaunchError when the cluster cannot hold them all."""
    resources = ray.cluster_resources()
    num_workers = config.num_ranks * config.data_parallel_size
    num_gpus, num_cpus = int(resources.get("GPU", 0)), resources.get("CPU", 1.0)
    if config.device == "cuda" or (config.device == "auto" and num_gpus):
        if num_gpus < num_workers:
            raise LaunchError(
                f"{num_workers} GPUs are needed and Ray has {num_gpus}; add nodes or lower the parallel sizes"
            )
        return {"CPU": 1.0, "GPU": 1.0}, {}
    num_nodes = len([node for node in ray.nodes() if node["Alive"]])
    threads = cores_per_worker(int(num_cpus) // num_nodes, -(-num_workers // num_nodes))
    # More CPU workers than cores is slow but right, so they share cores rather than wait for nodes that never come.
    return {"CPU": min(1.0, int(1000 * num_cpus / num_workers) / 1000)}, cpu_worker_env(threads)


def _here() -> NodeAffinitySchedulingStrategy:
    """Scheduler and frontends live where the command was started: that is the address users know."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _get(call: Any, timeout_s: float, what: str) -> Any:
    """ray.get with errors as one sentence."""
    try:
        return ray.get(call, timeout=timeout_s)
    except GetTimeoutError:
        raise LaunchError(f"{what} did not come up within {timeout_s:.0f} s") from None
    except RayTaskError as error:
        raise LaunchError(_first_line(error.cause)) from None
    except RayActorError as error:
        raise LaunchError(f"{what} could not start: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
