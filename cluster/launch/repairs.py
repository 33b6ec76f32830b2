"""Starts parts of a deployment again, takes replicas away, gives parts up: each in a thread of its own."""

import contextlib
import logging
import sys
import threading
from collections.abc import Callable
from typing import Literal

import grpc

from manta.cluster.launch.failures import Failures
from manta.cluster.launch.launcher import Launcher, LaunchError, Part
from manta.configs.schema import ServeConfig
from manta.protos import engine_pb2 as pb
from manta.protos import engine_pb2_grpc

logger = logging.getLogger(__name__)

_TELL_TIMEOUT_S = 1.5
_LOAD_TIMEOUT_S = 3600.0
_RETRY_S = 1.0
_PATIENCE_S = 20.0  # of a scheduler for workers that are being started, where there are others: nodes may take minutes
_JOIN_TIMEOUT_S = 10.0

SCHEDULER: Part = ("scheduler", 0)
Job = Literal["start", "retire", "give up"]


class Repairs:
    """One job a part at a time. Methods without a word on it need `changed`, which guards all attributes."""

    def __init__(
        self,
        config: ServeConfig,
        launcher: Launcher,
        engine: engine_pb2_grpc.EngineStub,
        workers: list[list[str]],
        clock: Callable[[], float],
    ) -> None:
        """workers: addresses by replica and rank, empty for a replica without workers."""
        self.changed = threading.Condition()
        self.jobs: dict[Part, Job] = {}
        self.failures = Failures(config.restart_limit)
        self._config = config
        self._launcher = launcher
        self._engine = engine
        self._workers = workers
        self._clock = clock
        self._threads: dict[Part, threading.Thread] = {}
        self._spawning: set[int] = set()  # replicas whose workers have no addresses yet
        self._withdrawn: set[int] = set()  # replicas that wait for room and are not wanted any more
        self._renewed: int | None = None  # a replica that gets workers for the scheduler's sake
        self._closed = False

    @property
    def is_closed(self) -> bool:
        return self._closed

    def has_workers(self, replica: int) -> bool:
        return bool(self._workers[replica])

    def start(self, part: Part, num_attempts: int) -> None:
        """Until the part serves, or so many attempts have failed; then it is given up."""
        if part[0] == "worker":
            self._spawning.add(part[1])
        self._begin(part, "start", lambda: self._start(part, num_attempts))

    def retire(self, replica: int) -> None:
        """What the replica has moves to others; then its workers end."""
        self._begin(("worker", replica), "retire", lambda: self._retire(replica))

    def renew(self, part: Part) -> None:
        """Starts a part that serves anew, without a request that fails for it."""
        self._begin(part, "start", lambda: self._renew(part))

    def give_up(self, part: Part, reason: str) -> None:
        """Ends what is left of the part and sets it aside."""
        self._begin(part, "give up", lambda: self._give_up(part, reason))

    def withdraw(self, replica: int) -> None:
        """A replica that is being started and waits for room is not needed any more."""
        self._withdrawn.add(replica)
        self._launcher.stop_workers(replica)

    def end(self) -> None:
        """Begins no more jobs; those under way end at their next turn, or with the launcher. Takes `changed`."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()

    def close(self) -> None:
        """Waits for the end of the jobs. The launcher has stopped. Takes `changed`."""
        self.end()
        with self.changed:
            threads = list(self._threads.values())
        for thread in threads:
            thread.join(_JOIN_TIMEOUT_S)

    def _begin(self, part: Part, job: Job, work: Callable[[], None]) -> None:
        if self._closed:
            return
        thread = threading.Thread(target=self._run, args=(part, work), name="repair", daemon=True)
        self.jobs[part], self._threads[part] = job, thread
        thread.start()

    # What follows runs in the threads of jobs and takes `changed` itself.

    def _run(self, part: Part, work: Callable[[], None]) -> None:
        try:
            work()
        finally:
            with self.changed:
                del self.jobs[part], self._threads[part]
                if part[0] == "worker":
                    self._spawning.discard(part[1])
                    self._withdrawn.discard(part[1])
                self.changed.notify_all()

    def _start(self, part: Part, num_attempts: int) -> None:
        began_s = self._clock()
        for attempt in range(1, num_attempts + 1):
            if self._closed:
                return
            reason = self._try(part, is_retry=attempt > 1)
            if reason is None:
                with self.changed:
                    self.failures.serves(part)
                tell(f"{name_of(part)} serves again after {self._clock() - began_s:.1f} s")
                return
            with self.changed:
                if self._closed:
                    return
                is_withdrawn = part[0] == "worker" and part[1] in self._withdrawn
                if not is_withdrawn and attempt < num_attempts:
                    tell(f"{name_of(part)} could not be started again: {reason}")
                    self.changed.wait_for(lambda: self._closed, _RETRY_S)
            if is_withdrawn:
                tell(f"{name_of(part)} is not needed any more and waits for room no longer")
                self._retire(part[1])
                return
        self._give_up(part, reason or "")

    def _renew(self, part: Part) -> None:
        role, index = part
        if role == "frontend":
            try:
                self._launcher.renew_frontend(self._config, index)
                tell(f"another {name_of(part)} serves; the old one answers those who are connected, and ends")
            except LaunchError as error:  # the old one serves on
                tell(f"{name_of(part)} could not be started anew: {error}")
            return
        if role == "worker":
            with contextlib.suppress(LaunchError):
                self._wait_until(lambda: SCHEDULER not in self.jobs)
                self._retire(index)
        self._start(part, self._config.restart_limit)

    def _try(self, part: Part, is_retry: bool) -> str | None:
        """None when the part serves, or why it does not."""
        try:
            self._start_again(part, is_retry)
        except (LaunchError, grpc.RpcError) as error:
            return _why(error)
        except Exception as error:  # a bug must not leave the part neither served nor given up
            logger.exception("starting %s again failed", name_of(part))
            return repr(error)
        return None

    def _retire(self, replica: int) -> None:
        try:
            self._engine.RetireReplica(pb.RetireReplicaRequest(replica=replica), timeout=_LOAD_TIMEOUT_S)
            self._workers[replica] = []
            self._launcher.stop_workers(replica)
        except (LaunchError, grpc.RpcError) as error:  # it is there still, and may be taken away later
            if not self._closed:
                logger.warning("taking replica %d away failed: %s", replica, _why(error))
        except Exception:  # what is to follow follows
            logger.exception("taking replica %d away failed", replica)

    def _give_up(self, part: Part, reason: str) -> None:
        """Its processes end and what they held is free while it rests."""
        role, index = part
        try:
            if role == "worker":
                self._workers[index] = []
                self._launcher.stop_workers(index)
            elif role == "frontend":
                self._launcher.stop_frontend(index)
        except LaunchError as error:
            logger.warning("what is left of %s could not be ended: %s", name_of(part), error)
        except Exception:  # it is given up all the same, and tried again
            logger.exception("what is left of %s could not be ended", name_of(part))
        if role == "worker":
            self.tell_given_up(index, reason)
        with self.changed:
            given_up = self.failures.give_up(part, reason, self._clock())
        tell(
            f"{name_of(part)} is given up: {reason.rstrip('.')}"
            + ("" if part == SCHEDULER else _again(given_up.rest_s))
        )

    def tell_given_up(self, replica: int, reason: str) -> None:
        """Tells the scheduler, which ends all requests when no other replica is left. Needs no `changed`."""
        try:
            self._engine.GiveUpReplica(pb.GiveUpReplicaRequest(replica=replica, reason=reason), timeout=_TELL_TIMEOUT_S)
        except grpc.RpcError as error:  # whoever looks at the load sees it, and tells again
            logger.warning("the scheduler did not hear that replica %d is given up: %s", replica, _why(error))

    def _start_again(self, part: Part, is_retry: bool) -> None:
        role, index = part
        if role == "worker":
            self._replace_workers(index)
        elif role == "scheduler":
            self._wait_for_workers()
            if is_retry or not any(self._workers):
                self._renew_one()
            self._launcher.replace_scheduler(self._config, self._workers)
        else:
            self._wait_until(lambda: SCHEDULER not in self.jobs)
            self._launcher.replace_frontend(self._config, index)

    def _wait_for_workers(self) -> None:
        """For those that are being started: a scheduler looks for workers once, as it starts. Where there are others,
        not for ever, and not for those that wait for room."""
        with self.changed:
            others = any(workers for replica, workers in enumerate(self._workers) if replica not in self._spawning)
        if others:
            self._wait_until(lambda: not self._spawning - self._launcher.waiting_for_room().keys(), _PATIENCE_S)
        else:
            self._wait_until(lambda: not self._spawning)

    def _renew_one(self) -> None:
        """New workers for a replica, first of all one that is broken, unless others are being started already: a
        scheduler needs one that can go on. It finds none in an idle deployment, and maybe none where all have failed it
        once; those that wait for it to load the model on them may have died meanwhile."""
        dead = {death.part for death in self._launcher.deaths()}
        with self.changed:
            parts: list[Part] = [("worker", i) for i in range(len(self._workers)) if i not in self._spawning]
            parts = [part for part in parts if part not in self.failures.given_up]
            broken = [part for part in parts if part in dead]
            if self._closed or not parts or (self._spawning and not broken):
                return
            part = (broken or parts)[0]
            waits_for_us = part in self.jobs  # and gives the scheduler the workers that there are by then
            self.jobs.setdefault(part, "start")  # nobody else repairs it meanwhile
            self._renewed = part[1]
        try:
            self._workers[part[1]] = self._launcher.replace_workers(self._config, part[1])
        finally:
            with self.changed:
                self._renewed = None
                if not waits_for_us:
                    del self.jobs[part]
                self.changed.notify_all()

    def _replace_workers(self, replica: int) -> None:
        self._wait_until(lambda: self._renewed != replica)
        with self.changed:
            self._spawning.add(replica)  # again, where it is not the first attempt
        self._workers[replica] = self._launcher.replace_workers(self._config, replica)
        with self.changed:
            self._spawning.discard(replica)
            self.changed.notify_all()
        self._wait_until(lambda: SCHEDULER not in self.jobs)
        request = pb.ReplaceWorkersRequest(replica=replica, workers=self._workers[replica])
        self._engine.ReplaceWorkers(request, timeout=_LOAD_TIMEOUT_S, wait_for_ready=True)

    def _wait_until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Raises LaunchError when the deployment is taken down first: what serves until then is left alone."""
        with self.changed:
            self.changed.wait_for(lambda: self._closed or condition(), timeout_s)
            if self._closed and not condition():
                raise LaunchError("the deployment is being taken down")


def name_of(part: Part) -> str:
    role, index = part
    return {"worker": f"replica {index}", "scheduler": "the scheduler"}.get(role, f"frontend {index}")


def tell(message: str) -> None:
    """To whoever reads what the command prints."""
    print(f"manta: {message}", file=sys.stderr, flush=True)


def _why(error: LaunchError | grpc.RpcError) -> str:
    return str(error.details() if isinstance(error, grpc.Call) else error)


def _again(rest_s: float) -> str:
    return f"; if it is needed, it is tried again after {rest_s:.0f} s"
