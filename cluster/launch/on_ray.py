"""Ray actors in placement groups: how a cluster runs Manta."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from manta.cluster.launch.actors import FrontendActor, SchedulerActor, WorkerActor
from manta.cluster.launch.launcher import Death, FrontendAddress, LaunchError, Part
from manta.cluster.launch.placement import Placement, plan_placement
from manta.cluster.launch.ray_cluster import first_line
from manta.configs.schema import ServeConfig

_ACTOR_TIMEOUT_S = 120.0
_LOAD_TIMEOUT_S = 3600.0
_NEW_NODE_TIMEOUT_S = 1800.0  # at the start; later a replica waits for room as long as it is wanted
_LOOK_FOR_ROOM_S = 1  # Ray takes whole seconds
_END_TIMEOUT_S = 5.0

# A restarted actor would be empty and answer wrongly; bringing up a new one is the launcher's business.
_ACTOR_OPTIONS = {"max_restarts": 0, "max_task_retries": 0}
_WORKER = ray.remote(**_ACTOR_OPTIONS, max_concurrency=4)(WorkerActor)
_SCHEDULER = ray.remote(**_ACTOR_OPTIONS)(SchedulerActor)
_FRONTEND = ray.remote(**_ACTOR_OPTIONS)(FrontendActor)
_OWN_OPTIONS = ("CPU", "GPU", "memory")  # resources that actors ask for by name


class RayLauncher:
    """Owns the actors and placement groups it creates. Ray must be connected."""

    def __init__(self, on_death: Callable[[], None] | None = None) -> None:
        """on_death: called, on some thread, when an actor has ended: `deaths` may tell more."""
        self._on_death = on_death
        self._placement = Placement({}, {}, "PACK", 1, 1)
        self._no_room: dict[int, str] = {}  # replicas that wait for room, and for what
        self._groups: list[PlacementGroup | None] = []  # by replica
        self._workers: list[list[Any]] = []  # by replica and rank
        self._scheduler: Any = None
        self._scheduler_address = ""
        self._frontends: list[Any] = []
        self._retiring: list[Any] = []  # frontends in whose place others serve; each ends by itself
        self._prepared: list[Any] = []
        self._doors: FrontendAddress | None = None
        self._lifelines: dict[Any, tuple[Part, str]] = {}  # never-ending call of an actor -> its part, its name
        self._lock = threading.Lock()  # held while actors are made or all are ended
        self._stopped = False

    def start_workers(self, config: ServeConfig) -> list[list[str]]:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._placement = plan_placement(config, nodes)
        self._groups = [None] * config.max_num_replicas
        self._workers = [[] for _ in self._groups]
        replicas = range(config.num_replicas_at_start)
        for replica, group in [(replica, self._ask_for_room(replica)) for replica in replicas]:  # nodes come for all
            self._place(config, replica, group, _NEW_NODE_TIMEOUT_S)
        calls = [[worker.start.remote() for worker in replica] for replica in self._workers]
        return [_get(replica, _ACTOR_TIMEOUT_S, "the workers") if replica else [] for replica in calls]

    def replace_workers(self, config: ServeConfig, replica: int) -> list[str]:
        """In a placement group of its own, as the node of the old one may be gone. One that is pending makes Ray's
        autoscaler add nodes, so it is waited for."""
        with self._lock:
            self._check_not_stopped()
        self.stop_workers(replica)
        self._place(config, replica, self._ask_for_room(replica), None)
        calls = [worker.start.remote() for worker in self._workers[replica]]
        if not calls:
            raise LaunchError(f"the workers of replica {replica} are not wanted any more")
        addresses: list[str] = _get(calls, _ACTOR_TIMEOUT_S, f"the workers of replica {replica}")
        return addresses

    def waiting_for_room(self) -> dict[int, str]:
        with self._lock:
            return dict(self._no_room)

    def stop_workers(self, replica: int) -> None:
        self._forget(("worker", replica), self._workers[replica])
        with self._lock:
            group, self._groups[replica], self._workers[replica] = self._groups[replica], None, []
        if group is not None:
            ray.util.remove_placement_group(group)

    def end_standby(self) -> None:
        """There is none."""

    def _ask_for_room(self, replica: int) -> PlacementGroup:
        placement = self._placement
        with self._lock:
            self._check_not_stopped()
            group = self._groups[replica] = placement_group(placement.bundles, strategy=placement.strategy)
        return group

    def _place(self, config: ServeConfig, replica: int, group: PlacementGroup, timeout_s: float | None) -> None:
        """Makes the actors of a replica's ranks."""
        placement = self._placement
        self._wait_for_room(group, replica, timeout_s)
        with self._lock:
            self._check_wanted(group, replica)
            for rank in range(config.num_ranks):
                worker = _WORKER.options(
                    num_cpus=placement.worker["CPU"],
                    num_gpus=placement.worker.get("GPU", 0),
                    memory=placement.worker.get("memory"),
                    resources={name: each for name, each in placement.worker.items() if name not in _OWN_OPTIONS},
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        group, placement_group_bundle_index=placement.bundle_of(rank)
                    ),
                    runtime_env={"env_vars": placement.env},
                ).remote()
                self._workers[replica].append(worker)
                self._watch(worker, ("worker", replica), f"worker {replica * config.num_ranks + rank}")

    def _wait_for_room(self, group: PlacementGroup, replica: int, timeout_s: float | None) -> None:
        """Until it is there or not wanted any more. With a timeout, as somebody waits, it says that it waits."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            while not self._is_placed(group):
                no_room = self._placement.no_room()
                with self._lock:
                    self._check_wanted(group, replica)
                    is_new = replica not in self._no_room
                    self._no_room[replica] = no_room
                if deadline_s is not None and is_new:
                    print(f"manta: replica {replica} waits: {no_room}", file=sys.stderr, flush=True)
                if deadline_s is not None and time.monotonic() > deadline_s:
                    raise LaunchError(f"{no_room}. None came within {timeout_s:.0f} s: add some or lower the sizes")
        finally:
            with self._lock:
                self._no_room.pop(replica, None)

    @staticmethod
    def _is_placed(group: PlacementGroup) -> bool:
        try:
            return bool(group.wait(timeout_seconds=_LOOK_FOR_ROOM_S))
        except Exception:  # noqa: BLE001  # Ray's own word for a group that was removed meanwhile
            time.sleep(_LOOK_FOR_ROOM_S)
            return False

    def _check_wanted(self, group: PlacementGroup, replica: int) -> None:
        """`_lock` is held."""
        self._check_not_stopped()
        if self._groups[replica] is not group:
            raise LaunchError(f"the workers of replica {replica} are not wanted any more")

    def start_scheduler(self, config: ServeConfig, workers: list[list[str]]) -> str:
        self._start_scheduler(config, workers, 0)
        return self._scheduler_address

    def replace_scheduler(self, config: ServeConfig, workers: list[list[str]]) -> None:
        with self._lock:
            self._check_not_stopped()
        self._forget(("scheduler", 0), [self._scheduler])
        self._start_scheduler(config, workers, int(self._scheduler_address.rpartition(":")[2]))

    def _start_scheduler(self, config: ServeConfig, workers: list[list[str]], port: int) -> None:
        """At `port` it takes another one's place."""
        with self._lock:
            self._check_not_stopped()
            actor = self._scheduler = _SCHEDULER.options(num_cpus=0, scheduling_strategy=_here()).remote()
            self._watch(actor, ("scheduler", 0), "the scheduler")
        call = actor.start.remote(config.model_dump_json(), workers, port)
        if not port:
            self._wait_for_first(call)
        self._scheduler_address = _get(call, _LOAD_TIMEOUT_S, "the scheduler")

    def _wait_for_first(self, call: Any) -> None:
        """Returns when the scheduler has loaded the model, or has failed. Raises LaunchError when a worker has died: by
        itself the scheduler would find out, but only after a minute where it waits for a process to come up."""
        with self._lock:
            lifelines = dict(self._lifelines)
        ended, _ = ray.wait([call, *lifelines], num_returns=1, timeout=_LOAD_TIMEOUT_S)
        if ended and ended[0] in lifelines:
            raise LaunchError(_death(ended[0], *lifelines[ended[0]]).reason)

    def prepare_frontends(self, config: ServeConfig) -> None:
        for index in range(config.api_server_count):
            self._frontends.append(None)
            self._prepared.append(self._make_frontend(config, index))

    def _make_frontend(self, config: ServeConfig, index: int) -> Any:
        with self._lock:
            self._check_not_stopped()
            actor = self._frontends[index] = _FRONTEND.options(num_cpus=0, scheduling_strategy=_here()).remote()
            self._watch(actor, ("frontend", index), f"frontend {index}")
        return actor.prepare.remote(config.model_dump_json(), list(config.api_key))

    def open_frontends(self, config: ServeConfig, scheduler: str) -> FrontendAddress:
        _get(self._prepared, _ACTOR_TIMEOUT_S, "the frontends")
        address = FrontendAddress(config.port, config.grpc_port)
        for number, actor in enumerate(self._frontends):
            call = actor.start.remote(scheduler, address.http_port, address.grpc_port, joins=number > 0)
            address = FrontendAddress(*_get(call, _ACTOR_TIMEOUT_S, "a frontend"))
        self._doors = address
        return address

    def replace_frontend(self, config: ServeConfig, index: int) -> None:
        assert self._doors is not None, "frontends have been opened"
        self._forget(("frontend", index), [self._frontends[index]])
        _get(self._make_frontend(config, index), _ACTOR_TIMEOUT_S, f"frontend {index}")
        self._join(index)

    def stop_frontend(self, index: int) -> None:
        self._forget(("frontend", index), self._frontends[index : index + 1])

    def renew_frontend(self, config: ServeConfig, index: int) -> None:
        part: Part = ("frontend", index)
        old = self._frontends[index]
        try:
            _get(self._make_frontend(config, index), _ACTOR_TIMEOUT_S, f"frontend {index}")
            self._join(index)
        except LaunchError:
            self._forget(part, [self._frontends[index]])
            with self._lock:
                self._frontends[index] = old
                self._watch(old, part, f"frontend {index}")
            raise
        with self._lock:
            gone = [call for call, each in self._lifelines.items() if each[0] == part][
                :-1
            ]  # the last is of the new one
            self._lifelines = {call: each for call, each in self._lifelines.items() if call not in gone}
            self._retiring.append(old)
        old.retire.remote(config.shutdown_timeout)

    def _join(self, index: int) -> None:
        """Lets a frontend that is prepared listen where the others do."""
        assert self._doors is not None, "frontends have been opened"
        ports = self._doors.http_port, self._doors.grpc_port
        call = self._frontends[index].start.remote(self._scheduler_address, *ports, joins=True)
        _get(call, _ACTOR_TIMEOUT_S, f"frontend {index}")

    def deaths(self) -> list[Death]:
        with self._lock:
            lifelines = dict(self._lifelines)
        if not lifelines:
            return []
        ended, _ = ray.wait(list(lifelines), num_returns=len(lifelines), timeout=0)
        return [_death(call, *lifelines[call]) for call in ended]

    def _watch(self, actor: Any, part: Part, name: str) -> None:
        """`_lock` is held."""
        call = actor.stay.remote()
        self._lifelines[call] = (part, name)
        if self._on_death is not None:
            on_death = self._on_death
            call.future().add_done_callback(lambda _: on_death())

    def _forget(self, part: Part, actors: list[Any]) -> None:
        """Ends what is to be replaced; its death is no news."""
        with self._lock:
            self._lifelines = {call: each for call, each in self._lifelines.items() if each[0] != part}
        for actor in actors:
            ray.kill(actor)

    def stop(self, grace_s: float) -> None:
        with self._lock:  # from now on nothing is made
            self._stopped = True
            self._lifelines.clear()
        frontends = [actor for actor in [*self._frontends, *self._retiring] if actor is not None]
        if calls := [frontend.stop.remote(grace_s) for frontend in frontends]:
            ray.wait(calls, num_returns=len(calls), timeout=grace_s + _END_TIMEOUT_S)  # some may have died
        if self._scheduler is not None:
            with contextlib.suppress(RayError):
                ray.get(self._scheduler.stop.remote(), timeout=_END_TIMEOUT_S)
        scheduler = [] if self._scheduler is None else [self._scheduler]
        workers = [worker for replica in self._workers for worker in replica]
        for actor in [*frontends, *scheduler, *workers]:
            ray.kill(actor)
        for group in self._groups:
            if group is not None:
                ray.util.remove_placement_group(group)
        self._frontends, self._retiring, self._scheduler = [], [], None
        self._workers, self._groups = [[] for _ in self._workers], [None] * len(self._groups)  # a repair may still look

    def _check_not_stopped(self) -> None:
        if self._stopped:
            raise LaunchError("the deployment is being taken down")


def _death(call: Any, part: Part, name: str) -> Death:
    try:
        ray.get(call, timeout=1)
    except RayTaskError as error:  # of an actor that lives and says itself what is wrong
        return Death(first_line(error.cause), part)
    except RayError as error:
        return Death(f"{name} has died: {first_line(error)}", part)
    return Death(f"{name} has ended", part)


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
        raise LaunchError(first_line(error.cause)) from None
    except RayActorError as error:
        raise LaunchError(f"{what} could not start: {first_line(error)}") from None
