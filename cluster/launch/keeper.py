"""Keeps a deployment whole and as large as its load: looks, and decides what is started, added or taken away."""

import os
import time
from collections.abc import Callable, Mapping

import grpc

from manta.cluster.engine.client import QUICK_RECONNECT
from manta.cluster.launch.autoscale import Autoscaler, Sample
from manta.cluster.launch.launcher import Launcher, Part
from manta.cluster.launch.repairs import SCHEDULER, Repairs, name_of, tell
from manta.cluster.launch.rolling import RollingRestart
from manta.configs.schema import ServeConfig
from manta.protos import engine_pb2 as pb
from manta.protos import engine_pb2_grpc

_CALL_TIMEOUT_S = 1.0
_NUM_SILENT = 3  # calls that the scheduler may leave unanswered: it never blocks
_NUM_SILENT_BUSY = 12  # the same on a host where processes wait for cores: it may only not have had its turn
_BUSY_LOAD = 2.0  # processes that run or wait, for each core
_TELL_WAIT_EVERY_S = 60.0


class Keeper:
    """`look` is called a few times a second by one thread. What it decides is done by the threads of `Repairs`."""

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
        self._clock = clock
        self._channel = grpc.insecure_channel(scheduler, options=QUICK_RECONNECT)
        self._engine = engine_pb2_grpc.EngineStub(self._channel)
        self._autoscaler = None if config.min_num_replicas == config.max_num_replicas else Autoscaler(config)
        self._num_silent = 0
        self._num_excused: dict[int, int] = {}  # by replica: failures that were not its fault, when it failed last
        self._told_waits_s: dict[int, float] = {}  # replicas that wait for room, and when that was told
        self._workers = workers
        self._repairs = Repairs(config, launcher, self._engine, workers, clock)
        self._rolling: RollingRestart | None = None

    def look(self) -> str | None:
        """Starts what is to be started; returns why the deployment cannot go on, if so."""
        repairs = self._repairs
        with repairs.changed:
            busy = set(repairs.jobs)  # what is seen of them now may be over when it has been seen
        broken, load = self._broken()
        self._tell_waits()
        self._tell_scheduler(load, busy)
        with repairs.changed:
            if load is not None and busy <= repairs.jobs.keys():
                self._scale(load)
            for part in sorted(broken, key=lambda part: part == SCHEDULER):  # it waits for workers that are started
                if part not in busy and part not in repairs.jobs and part not in repairs.failures.given_up:
                    self._begin(part, broken[part], is_excused=self._is_excused(part, load))
            self._try_again()
            return self._why_over()

    def roll(self) -> None:
        """Starts all parts anew, one after the other; nothing where that is under way."""
        if self._rolling is not None and not self._rolling.is_over:
            tell("a rolling restart is under way")
            return
        replicas: list[Part] = [("worker", replica) for replica, workers in enumerate(self._workers) if workers]
        frontends: list[Part] = [("frontend", index) for index in range(self._config.api_server_count)]
        self._rolling = RollingRestart(self._repairs, [*replicas, SCHEDULER, *frontends], self._clock)
        self._launcher.end_standby()
        self._rolling.start()

    def end(self) -> None:
        """Begins no more repairs; those under way end at their next turn, or with the launcher."""
        self._repairs.end()

    def close(self) -> None:
        """Waits for the end of the repairs. The launcher has stopped."""
        self._repairs.end()
        self._channel.close()
        self._repairs.close()

    def _broken(self) -> tuple[dict[Part, str], pb.LoadResponse | None]:
        """What does not serve, and why: processes that ended, and what only the scheduler, or its silence, tells of.
        Beside it the load, if it was told."""
        broken = {death.part: death.reason for death in reversed(self._launcher.deaths())}
        if SCHEDULER in broken or SCHEDULER in self._repairs.jobs:
            self._num_silent = 0
            return broken, None
        load = self._load()
        self._num_silent = 0 if load is not None else self._num_silent + 1
        if self._num_silent >= (_NUM_SILENT_BUSY if _is_host_busy() else _NUM_SILENT):
            broken[SCHEDULER] = f"the scheduler has not answered {self._num_silent} calls of {_CALL_TIMEOUT_S:g} s"
        for replica, each in enumerate(load.replicas if load is not None else ()):
            if each.state == pb.ReplicaLoad.LOST:
                broken.setdefault(("worker", replica), each.detail)
        return broken, load

    def _scale(self, load: pb.LoadResponse) -> None:
        """Adds replicas, or takes one away, where the load asks for it. `changed` is held."""
        if self._autoscaler is None:
            return
        jobs = {index: job for (role, index), job in self._repairs.jobs.items() if role == "worker"}
        sample = Sample.of(load, self._clock(), self._config.block_size, jobs)
        wanted = self._autoscaler.wanted(sample)
        asked = f"{load.num_running} requests run and {load.num_waiting} wait"
        for replica in self._to_add(load, jobs)[: max(wanted - sample.num_present, 0)]:
            tell(f"replica {replica} is added: {asked}")
            is_given_up = ("worker", replica) in self._repairs.failures.given_up
            self._repairs.start(("worker", replica), 1 if is_given_up else self._config.restart_limit)
        if wanted < sample.num_present:
            self._take_one_away(load, jobs, asked)

    def _to_add(self, load: pb.LoadResponse, jobs: Mapping[int, str]) -> list[int]:
        """Replicas that may be brought up, those that have failed last."""
        given_up = {index for role, index in self._repairs.failures.given_up if role == "worker"}
        states = [(index, each.state) for index, each in enumerate(load.replicas) if index not in jobs]
        absent = [index for index, state in states if state == pb.ReplicaLoad.ABSENT and index not in given_up]
        return absent + [index for role, index in self._rested() if role == "worker" and index not in jobs]

    def _take_one_away(self, load: pb.LoadResponse, jobs: Mapping[int, str], asked: str) -> None:
        """One that still waits for room, else the one with the least to do."""
        waiting = [replica for replica in self._launcher.waiting_for_room() if jobs.get(replica) == "start"]
        if waiting:
            self._repairs.withdraw(max(waiting))
            return
        serving = [i for i, each in enumerate(load.replicas) if each.state == pb.ReplicaLoad.SERVING and i not in jobs]
        if serving:
            replica = min(serving, key=lambda index: (load.replicas[index].num_running, -index))
            tell(f"replica {replica} is taken away: {asked}")
            self._repairs.retire(replica)

    def _is_excused(self, part: Part, load: pb.LoadResponse | None) -> bool:
        """Whether a replica has failed again and requests are to blame for that: they are dealt with, and what is left
        of the limit is for failures of its own."""
        role, index = part
        if role != "worker" or load is None or index >= len(load.replicas):
            return False
        num_excused = load.replicas[index].num_excused
        before, self._num_excused[index] = self._num_excused.get(index, 0), num_excused
        return num_excused > before

    def _begin(self, part: Part, reason: str, *, is_excused: bool) -> None:
        """`changed` is held."""
        failures = self._repairs.failures
        if part == SCHEDULER:
            self._num_silent = 0  # of the next one
        if not is_excused and failures.add(part, self._clock()):
            self._repairs.give_up(part, reason + failures.how_often())
            return
        tell(f"{reason}; {name_of(part)} is started again")
        self._repairs.start(part, self._config.restart_limit)

    def _try_again(self) -> None:
        """Parts that were given up and have rested, but for replicas that come when the load asks for them. `changed`
        is held."""
        for part in self._rested():
            if part not in self._repairs.jobs and (part[0] != "worker" or self._autoscaler is None):
                tell(f"{name_of(part)}, which was given up, is tried again")
                self._repairs.start(part, num_attempts=1)

    def _rested(self) -> list[Part]:
        return [part for part in self._repairs.failures.rested(self._clock()) if part != SCHEDULER]

    def _tell_waits(self) -> None:
        """Says, and from time to time again, which replicas wait for room."""
        waits = self._launcher.waiting_for_room()
        now_s = self._clock()
        told = {replica: at_s for replica, at_s in self._told_waits_s.items() if replica in waits}
        for replica, why in waits.items():
            if now_s - told.get(replica, -_TELL_WAIT_EVERY_S) >= _TELL_WAIT_EVERY_S:
                tell(f"replica {replica} waits: {why}")
                told[replica] = now_s
        self._told_waits_s = told

    def _tell_scheduler(self, load: pb.LoadResponse | None, busy: set[Part]) -> None:
        """A scheduler that has taken another one's place does not know which replicas are given up."""
        with self._repairs.changed:
            given_up = {part[1]: each.reason for part, each in self._repairs.failures.given_up.items()
                        if part[0] == "worker" and part not in busy and part not in self._repairs.jobs}  # fmt: skip
        for replica, each in enumerate(load.replicas if load is not None else ()):
            if replica in given_up and each.state in (pb.ReplicaLoad.LOST, pb.ReplicaLoad.ABSENT):
                self._repairs.tell_given_up(replica, given_up[replica])

    def _why_over(self) -> str | None:
        """`changed` is held."""
        given_up = self._repairs.failures.given_up
        if SCHEDULER in given_up:
            return given_up[SCHEDULER].reason
        for role, number in (
            ("worker", self._config.max_num_replicas),
            ("frontend", self._config.api_server_count),
        ):
            reasons = [each.reason for part, each in given_up.items() if part[0] == role]
            if len(reasons) == number:
                return reasons[-1]
        return None

    def _load(self) -> pb.LoadResponse | None:
        try:
            load: pb.LoadResponse = self._engine.GetLoad(pb.LoadRequest(), timeout=_CALL_TIMEOUT_S)
        except grpc.RpcError:
            return None
        return load


def _is_host_busy() -> bool:
    """Of the last minute. The scheduler runs beside whoever keeps the deployment."""
    return os.getloadavg()[0] > _BUSY_LOAD * len(os.sched_getaffinity(0))
