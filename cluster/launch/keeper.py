"""Keeps a deployment whole: what has died is started again, until it dies too often."""

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

import grpc

from manta.cluster.engine.client import QUICK_RECONNECT
from manta.cluster.launch.autoscale import Autoscaler, Sample
from manta.cluster.launch.launcher import Launcher, LaunchError, Part
from manta.configs.schema import ServeConfig
from manta.protos import engine_pb2 as pb
from manta.protos import engine_pb2_grpc

logger = logging.getLogger(__name__)

WITHIN_S = 60.0  # config.restart_limit failures within this time, or starts in a row that fail: a part is given up
_CALL_TIMEOUT_S = 1.5
_NUM_SILENT = 3  # calls that the scheduler may leave unanswered: it never blocks, but its host may be loaded
_LOAD_TIMEOUT_S = 3600.0
_RETRY_S = 1.0
_PATIENCE_S = 20.0  # of a scheduler for workers that are being started, where there are others: nodes may take minutes
_JOIN_TIMEOUT_S = 10.0

_SCHEDULER: Part = ("scheduler", 0)


class Keeper:
    """`look` is called a few times a second by one thread; each repair has a thread of its own."""

    def __init__(
        self,
        config: ServeConfig,
        launcher: Launcher,
        scheduler: str,
        workers: list[list[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """scheduler: "host:port"; workers: addresses by replica and rank."""
        self._config = config
        self._launcher = launcher
        self._workers = workers
        self._clock = clock
        self._channel = grpc.insecure_channel(scheduler, options=QUICK_RECONNECT)
        self._engine = engine_pb2_grpc.EngineStub(self._channel)
        self._autoscaler = None if config.min_num_replicas == config.max_num_replicas else Autoscaler(config)
        self._num_silent = 0
        self._changed = threading.Condition()  # guards what follows
        self._repairs: dict[Part, threading.Thread] = {}
        self._spawning: set[int] = set()  # replicas whose workers have no addresses yet
        self._failed_s: dict[Part, deque[float]] = {}
        self._given_up: dict[Part, str] = {}
        self._closed = False

    def look(self) -> str | None:
        """Starts what is to be started again; returns why the deployment cannot go on, if so."""
        with self._changed:
            busy = set(self._repairs)  # what is seen of them now may be over when it has been seen
        broken, load = self._broken()
        with self._changed:
            self._scale(None if busy else load)
            for part in sorted(broken, key=lambda part: part == _SCHEDULER):  # it waits for workers that are started
                if part not in busy and part not in self._repairs and part not in self._given_up:
                    self._begin(part, broken[part])
            return self._why_over()

    def end(self) -> None:
        """Begins no more repairs; those under way end at their next turn, or with the launcher."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Waits for the end of the repairs. The launcher has stopped."""
        self.end()
        with self._changed:
            threads = list(self._repairs.values())
        self._channel.close()
        for thread in threads:
            thread.join(_JOIN_TIMEOUT_S)

    def _broken(self) -> tuple[dict[Part, str], pb.LoadResponse | None]:
        """What does not serve, and why: processes that ended, and what only the scheduler, or its silence, tells of.
        Beside it the load, if it was told."""
        broken = {death.part: death.reason for death in reversed(self._launcher.deaths())}
        if _SCHEDULER in broken or _SCHEDULER in self._repairs:
            self._num_silent = 0
            return broken, None
        load = self._load()
        self._num_silent = 0 if load is not None else self._num_silent + 1
        if self._num_silent >= _NUM_SILENT:
            broken[_SCHEDULER] = f"the scheduler has not answered {_NUM_SILENT} calls of {_CALL_TIMEOUT_S:g} s"
        for replica, each in enumerate(load.replicas if load is not None else ()):
            if each.state == pb.ReplicaLoad.LOST:
                broken.setdefault(("worker", replica), each.detail)
        return broken, load

    def _scale(self, load: pb.LoadResponse | None) -> None:
        """Adds replicas, or takes one away, where the load asks for it. `_changed` is held."""
        if load is None or self._autoscaler is None or self._repairs:  # one thing at a time
            return
        sample = Sample.of(load, self._clock(), self._config.block_size)
        wanted = self._autoscaler.wanted(sample)
        absent = [index for index, each in enumerate(load.replicas) if each.state == pb.ReplicaLoad.ABSENT]
        for replica in absent[: max(wanted - sample.num_present, 0)]:
            _tell(f"replica {replica} is added: {load.num_running} requests run and {load.num_waiting} wait")
            self._spawning.add(replica)
            self._start_thread(("worker", replica), self._repair)
        if wanted < sample.num_present:
            serving = [i for i, each in enumerate(load.replicas) if each.state == pb.ReplicaLoad.SERVING]
            if serving:
                replica = min(serving, key=lambda index: (load.replicas[index].num_running, -index))
                _tell(f"replica {replica} is taken away: {load.num_running} requests run and {load.num_waiting} wait")
                self._start_thread(("worker", replica), self._retire)

    def _retire(self, part: Part, began_s: float) -> None:
        """What the replica has moves to others; then its workers end."""
        replica = part[1]
        try:
            self._engine.RetireReplica(pb.RetireReplicaRequest(replica=replica), timeout=_LOAD_TIMEOUT_S)
            self._workers[replica] = []
            self._launcher.stop_workers(replica)
        except (LaunchError, grpc.RpcError) as error:  # it is there still, and may be taken away later
            logger.warning("taking replica %d away failed: %s", replica, error)
        self._end_repair(part)

    def _start_thread(self, part: Part, work: Callable[[Part, float], None]) -> None:
        thread = threading.Thread(target=work, args=(part, self._clock()), name="repair", daemon=True)
        self._repairs[part] = thread
        thread.start()

    def _begin(self, part: Part, reason: str) -> None:
        """`_changed` is held."""
        if self._closed:
            return
        limit = self._config.restart_limit
        times = self._failed_s.setdefault(part, deque(maxlen=limit))
        times.append(self._clock())
        if len(times) == limit and times[-1] - times[0] <= WITHIN_S:
            how_often = f" ({limit} times within {WITHIN_S:.0f} s)" if limit > 1 else ""
            self._give_up(part, reason + how_often)
            return
        _tell(f"{reason}; {_name(part)} is started again")
        if part[0] == "worker":
            self._spawning.add(part[1])
        self._start_thread(part, self._repair)

    def _repair(self, part: Part, began_s: float) -> None:
        """Until the part serves, or has failed too often."""
        for attempt in range(1, self._config.restart_limit + 1):
            try:
                self._start_again(part, is_retry=attempt > 1)
                _tell(f"{_name(part)} serves again after {self._clock() - began_s:.1f} s")
                break
            except (LaunchError, grpc.RpcError) as error:
                reason = error.details() if isinstance(error, grpc.Call) else str(error)
            except Exception as error:  # a bug must not leave the part neither served nor given up
                logger.exception("starting %s again failed", _name(part))
                reason = repr(error)
            with self._changed:
                if self._closed:
                    return
                if attempt == self._config.restart_limit:
                    self._give_up(part, str(reason))
                else:
                    _tell(f"{_name(part)} could not be started again: {reason}")
                    self._changed.wait_for(lambda: self._closed, _RETRY_S)
        self._end_repair(part)

    def _end_repair(self, part: Part) -> None:
        with self._changed:
            del self._repairs[part]
            self._spawning.discard(part[1] if part[0] == "worker" else -1)
            self._changed.notify_all()

    def _start_again(self, part: Part, is_retry: bool) -> None:
        role, index = part
        if role == "worker":
            self._replace_workers(index)
        elif role == "scheduler":
            others_in_s = _PATIENCE_S if self._others_than_spawning() else None
            self._wait_until(lambda: not self._spawning, others_in_s)  # it looks for workers once, as it starts
            if is_retry or not any(self._workers):
                self._renew_one()
            self._launcher.replace_scheduler(self._config, self._workers)
        else:
            self._wait_until(lambda: _SCHEDULER not in self._repairs)
            self._launcher.replace_frontend(self._config, index)

    def _others_than_spawning(self) -> bool:
        with self._changed:
            return any(workers for replica, workers in enumerate(self._workers) if replica not in self._spawning)

    def _renew_one(self) -> None:
        """New workers for a replica, unless another one gets some already: a scheduler needs one that can go on. It
        finds none in an idle deployment, and maybe none where all have failed it once."""
        with self._changed:
            if self._closed or any(role == "worker" for role, _ in self._repairs):
                return
            replica = next((i for i in range(len(self._workers)) if ("worker", i) not in self._given_up), None)
            if replica is None:
                return
            self._repairs["worker", replica] = threading.current_thread()  # nobody else repairs it meanwhile
        try:
            self._workers[replica] = self._launcher.replace_workers(self._config, replica)
        finally:
            with self._changed:
                del self._repairs["worker", replica]

    def _replace_workers(self, replica: int) -> None:
        with self._changed:
            self._spawning.add(replica)  # again, where it is not the first attempt
        self._workers[replica] = self._launcher.replace_workers(self._config, replica)
        with self._changed:
            self._spawning.discard(replica)
            self._changed.notify_all()
        self._wait_until(lambda: _SCHEDULER not in self._repairs)
        request = pb.ReplaceWorkersRequest(replica=replica, workers=self._workers[replica])
        self._engine.ReplaceWorkers(request, timeout=_LOAD_TIMEOUT_S, wait_for_ready=True)

    def _wait_until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or condition(), timeout_s)

    def _give_up(self, part: Part, reason: str) -> None:
        """`_changed` is held. Requests that wait for a replica hear that none will come."""
        self._given_up[part] = reason
        _tell(f"{_name(part)} is given up: {reason}")
        if part[0] == "worker":
            request = pb.GiveUpReplicaRequest(replica=part[1], reason=reason)
            try:
                self._engine.GiveUpReplica(request, timeout=_CALL_TIMEOUT_S)
            except grpc.RpcError as error:
                logger.warning("the scheduler did not hear that replica %d is given up: %s", part[1], error)

    def _why_over(self) -> str | None:
        """`_changed` is held."""
        if _SCHEDULER in self._given_up:
            return self._given_up[_SCHEDULER]
        for role, number in (
            ("worker", self._config.max_num_replicas),
            ("frontend", self._config.api_server_count),
        ):
            given_up = [reason for part, reason in self._given_up.items() if part[0] == role]
            if len(given_up) == number:
                return given_up[-1]
        return None

    def _load(self) -> pb.LoadResponse | None:
        try:
            load: pb.LoadResponse = self._engine.GetLoad(pb.LoadRequest(), timeout=_CALL_TIMEOUT_S)
        except grpc.RpcError:
            return None
        return load


def _name(part: Part) -> str:
    role, index = part
    return {"worker": f"replica {index}", "scheduler": "the scheduler"}.get(role, f"frontend {index}")


def _tell(message: str) -> None:
    print(f"manta: {message}", file=sys.stderr, flush=True)
