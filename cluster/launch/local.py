"""Plain processes on this host: how a notebook, one GPU box and a machine without Ray run Manta."""

import json
import os
import threading
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path

from manta.cluster.launch.launcher import Death, FrontendAddress, LaunchError, cores_per_worker, cpu_worker_env
from manta.cluster.launch.process import ChildProcess
from manta.configs.api_keys import HASHES_VARIABLE
from manta.configs.schema import ServeConfig

_SPAWN_TIMEOUT_S = 120.0
_LOAD_TIMEOUT_S = 3600.0  # reading the weights of a large model from a slow disk
_END_TIMEOUT_S = 5.0
_STANDBY_DELAY_S = 5.0  # longer than a worker takes to load a small model
_WORKER = "manta.workers.main"


def local_gpus(host_gpus: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """CUDA devices this process may use, as CUDA_VISIBLE_DEVICES names them; without importing torch."""
    num_gpus = len(list(host_gpus.glob("*")))
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not num_gpus or allowed is None:
        return [str(index) for index in range(num_gpus)]
    names = [name.strip() for name in allowed.split(",")]
    return list(takewhile(lambda name: name not in ("", "-1"), names))  # CUDA, too, stops at the first invalid one


class LocalLauncher:
    """Owns the child processes it starts."""

    def __init__(self, on_death: Callable[[], None] | None = None) -> None:
        """on_death: called, on some thread, when a process has ended: `deaths` may tell more."""
        self._on_death = on_death
        self._workers: list[list[ChildProcess]] = []  # by replica and rank
        self._worker_envs: list[dict[str, str]] = []  # by number: replica * ranks + rank
        self._scheduler: ChildProcess | None = None
        self._scheduler_address = ""
        self._frontends: list[ChildProcess] = []
        self._retiring: list[ChildProcess] = []  # frontends in whose place others serve
        self._doors: FrontendAddress | None = None
        self._standby: list[ChildProcess] = []  # workers that wait for their turn
        self._standby_env: dict[str, str] = {}
        self._lock = threading.Lock()  # held while a process is started or all are ended
        self._stopped = False

    def start_workers(self, config: ServeConfig) -> list[list[str]]:
        num_workers = config.num_ranks * config.max_num_replicas
        gpus = local_gpus() if config.device != "cpu" else []
        if config.device == "cuda" and len(gpus) < num_workers:
            raise LaunchError(f"{num_workers} GPUs are needed and this host has {len(gpus)}; lower the parallel sizes")
        use_gpus = len(gpus) >= num_workers
        cpu_env = cpu_worker_env(cores_per_worker(os.cpu_count() or 1, num_workers))
        self._worker_envs = [{"CUDA_VISIBLE_DEVICES": gpus[i]} if use_gpus else cpu_env for i in range(num_workers)]
        self._standby_env = {} if use_gpus else cpu_env
        self._workers = [[] for _ in range(config.max_num_replicas)]
        for replica in range(config.num_replicas_at_start):
            self._start_ranks(replica, config.num_ranks)
        return [[child.wait_for_address(_SPAWN_TIMEOUT_S) for child in replica] for replica in self._workers]

    def replace_workers(self, config: ServeConfig, replica: int) -> list[str]:
        """Where some of its ranks have died, the others stay: they have their weights, and will meet the new ones."""
        with self._lock:
            self._check_not_stopped()
        ranks = self._workers[replica]
        living = [child for child in ranks if not (child.ended() or child.stopped())]
        if len(living) in (0, len(ranks)):
            living = []
        for child in ranks:
            if child not in living:
                child.kill()
        self._start_ranks(replica, config.num_ranks, living)
        self._stand_by(config, _STANDBY_DELAY_S)
        return [child.wait_for_address(_SPAWN_TIMEOUT_S) for child in self._workers[replica]]

    def waiting_for_room(self) -> dict[int, str]:
        return {}  # there is none but this host

    def stop_workers(self, replica: int) -> None:
        with self._lock:
            children, self._workers[replica] = self._workers[replica], []
        for child in children:
            child.terminate()
        for child in children:
            child.join(_END_TIMEOUT_S)

    def end_standby(self) -> None:
        with self._lock:
            children, self._standby = self._standby, []
        for child in children:
            child.terminate()

    def _start_ranks(self, replica: int, num_ranks: int, living: Sequence[ChildProcess] = ()) -> None:
        """All of them, but for those that live."""
        with self._lock:
            self._check_not_stopped()
            kept = {rank: child for rank, child in enumerate(self._workers[replica]) if child in living}
            self._workers[replica] = [
                kept.get(rank) or self._start_worker(replica * num_ranks + rank) for rank in range(num_ranks)
            ]

    def _start_worker(self, number: int) -> ChildProcess:
        """One that stood by, if there is one, else a new process. `_lock` is held."""
        name, env = f"worker {number}", self._worker_envs[number]
        while self._standby:
            child = self._standby.pop()
            if child.ended() is None:
                child.name = name
                child.tell(json.dumps(env))
                return child
        return self._child(name, _WORKER, ["--port", "0", *_parent()], env)

    def _stand_by(self, config: ServeConfig, delay_s: float) -> None:
        """Starts, after a while in which others need the cores, the processes that are to stand by and do not."""

        def start() -> None:
            with self._lock:
                if self._stopped:
                    return
                self._standby = [child for child in self._standby if child.ended() is None]
                for _ in range(config.standby_workers - len(self._standby)):
                    args = ["--port", "0", "--standby", *_parent()]
                    self._standby.append(self._child("standby worker", _WORKER, args, self._standby_env))

        if config.standby_workers:
            timer = threading.Timer(delay_s, start)
            timer.daemon = True
            timer.start()

    def start_scheduler(self, config: ServeConfig, workers: list[list[str]]) -> str:
        self._start_scheduler(config, workers, [])
        return self._scheduler_address

    def replace_scheduler(self, config: ServeConfig, workers: list[list[str]]) -> None:
        with self._lock:
            self._check_not_stopped()
        if self._scheduler is not None:
            self._scheduler.kill()
        port = self._scheduler_address.rpartition(":")[2]
        self._start_scheduler(config, workers, ["--port", port, "--takes-over"])

    def _start_scheduler(self, config: ServeConfig, workers: list[list[str]], more: list[str]) -> None:
        addresses = ";".join(",".join(replica) for replica in workers)
        args = ["--config-json", config.model_dump_json(), "--workers", addresses, *more, *_parent()]
        with self._lock:
            self._check_not_stopped()
            child = self._scheduler = ChildProcess(
                "scheduler", "manta.cluster.engine.main", args, on_end=self._on_death
            )
        takes_over = bool(more)  # then it goes on with the replicas that there are
        self._scheduler_address = child.wait_for_address(_LOAD_TIMEOUT_S, None if takes_over else self._dead_worker)

    def _dead_worker(self) -> str | None:
        """What the scheduler waits for in vain, when it loads the model on workers one of which has died. It would find
        out by itself, where it waits for a process to come up only after a minute."""
        children = [child for replica in self._workers for child in replica]
        return next((why for child in children if (why := child.ended())), None)

    def prepare_frontends(self, config: ServeConfig) -> None:
        with self._lock:
            self._frontends = [self._make_frontend(config, index) for index in range(config.api_server_count)]

    def open_frontends(self, config: ServeConfig, scheduler: str) -> FrontendAddress:
        address = FrontendAddress(config.port, config.grpc_port)
        for number, child in enumerate(self._frontends):
            address = self._open(child, scheduler, address, joins=number > 0)
        self._doors = address
        self._stand_by(config, 0.0)
        return address

    def replace_frontend(self, config: ServeConfig, index: int) -> None:
        assert self._doors is not None, "frontends have been opened"
        self._frontends[index].kill()
        with self._lock:
            self._check_not_stopped()
            child = self._frontends[index] = self._make_frontend(config, index)
        self._open(child, self._scheduler_address, self._doors, joins=True)

    def stop_frontend(self, index: int) -> None:
        with self._lock:
            self._check_not_stopped()
        self._frontends[index].kill()

    def renew_frontend(self, config: ServeConfig, index: int) -> None:
        assert self._doors is not None, "frontends have been opened"
        with self._lock:
            self._check_not_stopped()
            self._retiring = [child for child in self._retiring if child.ended() is None]
            child = self._make_frontend(config, index)
            self._retiring.append(child)  # so that it ends with the others until it has its place
        try:
            self._open(child, self._scheduler_address, self._doors, joins=True)
        except LaunchError:
            child.kill()
            raise
        with self._lock:
            self._check_not_stopped()
            self._retiring.remove(child)
            old, self._frontends[index] = self._frontends[index], child
            self._retiring.append(old)
        old.make_way()

    def _child(self, name: str, module: str, args: list[str], env: dict[str, str] | None = None) -> ChildProcess:
        return ChildProcess(name, module, args, env, on_end=self._on_death)

    def _make_frontend(self, config: ServeConfig, index: int) -> ChildProcess:
        args = ["--config-json", config.model_dump_json(), *_parent()]
        env = {HASHES_VARIABLE: ",".join(config.api_key)}  # the words of a command can be read by all users of a host
        return self._child(f"frontend {index}", "manta.cluster.doors.main", args, env)

    def _open(self, child: ChildProcess, scheduler: str, address: FrontendAddress, joins: bool) -> FrontendAddress:
        child.tell(f"{scheduler} {address.http_port} {address.grpc_port}" + " joins" * joins)
        http, grpc = child.wait_for_address(_SPAWN_TIMEOUT_S).split()
        return FrontendAddress(int(http.rsplit(":", 1)[1]), int(grpc.rsplit(":", 1)[1]))

    def deaths(self) -> list[Death]:
        deaths = [
            Death(why, ("worker", replica))
            for replica, children in enumerate(self._workers)
            for child in children
            if (why := child.ended() or child.stopped())
        ]
        if self._scheduler is not None and (why := self._scheduler.ended() or self._scheduler.stopped()):
            deaths.append(Death(why, ("scheduler", 0)))
        return deaths + [
            Death(why, ("frontend", index))
            for index, child in enumerate(self._frontends)
            if (why := child.ended() or child.stopped())
        ]

    def stop(self, grace_s: float) -> None:
        with self._lock:  # from now on nothing is started
            self._stopped = True
        scheduler = [] if self._scheduler is None else [self._scheduler]
        for children, patience_s in (
            (self._frontends + self._retiring, grace_s + _END_TIMEOUT_S),
            (scheduler, _END_TIMEOUT_S),
            (self._standby + [child for replica in self._workers for child in replica], _END_TIMEOUT_S),
        ):
            for child in children:
                child.terminate()
            for child in children:
                child.join(patience_s)
        self._frontends, self._retiring, self._scheduler, self._standby = [], [], None, []
        self._workers = [[] for _ in self._workers]  # a repair may still look

    def _check_not_stopped(self) -> None:
        if self._stopped:
            raise LaunchError("the deployment is being taken down")


def _parent() -> list[str]:
    """Every role ends itself when this process is gone."""
    return ["--parent-pid", str(os.getpid())]
