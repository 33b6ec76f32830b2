"""Plain processes on this host: how a notebook, one GPU box and a machine without Ray run Manta."""

import os
from itertools import takewhile
from pathlib import Path

from manta.cluster.launch.launcher import Death, FrontendAddress, LaunchError, cores_per_worker, cpu_worker_env
from manta.cluster.launch.process import ChildProcess
from manta.configs.api_keys import HASHES_VARIABLE
from manta.configs.schema import ServeConfig

_SPAWN_TIMEOUT_S = 120.0
_LOAD_TIMEOUT_S = 3600.0  # reading the weights of a large model from a slow disk
_END_TIMEOUT_S = 5.0


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

    def __init__(self) -> None:
        self._num_ranks = 1
        self._workers: list[ChildProcess] = []
        self._schedulers: list[ChildProcess] = []
        self._frontends: list[ChildProcess] = []

    def start_workers(self, config: ServeConfig) -> list[list[str]]:
        self._num_ranks = config.num_ranks
        num_workers = config.num_ranks * config.data_parallel_size
        gpus = local_gpus() if config.device != "cpu" else []
        if config.device == "cuda" and len(gpus) < num_workers:
            raise LaunchError(f"{num_workers} GPUs are needed and this host has {len(gpus)}; lower the parallel sizes")
        use_gpus = len(gpus) >= num_workers
        cpu_env = cpu_worker_env(cores_per_worker(os.cpu_count() or 1, num_workers))
        for rank in range(num_workers):
            env = {"CUDA_VISIBLE_DEVICES": gpus[rank]} if use_gpus else cpu_env
            self._workers.append(ChildProcess(f"worker {rank}", "manta.workers.main", ["--port", "0", *_parent()], env))
        addresses = [worker.wait_for_address(_SPAWN_TIMEOUT_S) for worker in self._workers]
        ranks = config.num_ranks
        return [addresses[i : i + ranks] for i in range(0, num_workers, ranks)]

    def start_scheduler(self, config: ServeConfig, workers: list[list[str]]) -> str:
        addresses = ";".join(",".join(replica) for replica in workers)
        args = ["--config-json", config.model_dump_json(), "--workers", addresses, *_parent()]
        child = ChildProcess("scheduler", "manta.cluster.engine.main", args)
        self._schedulers.append(child)
        return child.wait_for_address(_LOAD_TIMEOUT_S)

    def prepare_frontends(self, config: ServeConfig) -> None:
        args = ["--config-json", config.model_dump_json(), *_parent()]
        env = {HASHES_VARIABLE: ",".join(config.api_key)}  # the words of a command can be read by all users of a host
        for index in range(config.api_server_count):
            self._frontends.append(ChildProcess(f"frontend {index}", "manta.cluster.doors.main", args, env))

    def open_frontends(self, config: ServeConfig, scheduler: str) -> FrontendAddress:
        address = FrontendAddress(config.port, config.grpc_port)
        for child in self._frontends:
            child.tell(f"{scheduler} {address.http_port} {address.grpc_port}")
            http, grpc = child.wait_for_address(_SPAWN_TIMEOUT_S).split()
            address = FrontendAddress(int(http.rsplit(":", 1)[1]), int(grpc.rsplit(":", 1)[1]))
        return address

    def deaths(self) -> list[Death]:
        replicas = {worker: index // self._num_ranks for index, worker in enumerate(self._workers)}
        children = [*self._workers, *self._schedulers, *self._frontends]
        return [Death(why, replicas.get(child)) for child in children if (why := child.ended())]

    def stop(self, grace_s: float) -> None:
        for children, patience_s in (
            (self._frontends, grace_s + _END_TIMEOUT_S),
            (self._schedulers, _END_TIMEOUT_S),
            (self._workers, _END_TIMEOUT_S),
        ):
            for child in children:
                child.terminate()
            for child in children:
                child.join(patience_s)
            children.clear()


def _parent() -> list[str]:
    """Every role ends itself when this process is gone."""
    return ["--parent-pid", str(os.getpid())]
