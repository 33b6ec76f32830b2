"""What starts, watches and ends the processes of a deployment. Two kinds: Ray actors, and plain processes."""

import os
from dataclasses import dataclass
from typing import Literal, Protocol

from manta.configs.schema import ServeConfig


class LaunchError(Exception):
    """A process could not be started or has died; the message is one sentence that names it and says why."""


Role = Literal["worker", "scheduler", "frontend"]
Part = tuple[Role, int]  # with the number of the worker's replica, or of the frontend


@dataclass(frozen=True, slots=True)
class Death:
    """A process that has ended by itself."""

    reason: str  # one sentence that names it
    part: Part


@dataclass(frozen=True, slots=True)
class FrontendAddress:
    http_port: int
    grpc_port: int


class Launcher(Protocol):
    """Starts workers and frontends, then the scheduler, then opens the doors; ends all in the order frontends,
    scheduler, workers."""

    def start_workers(self, config: ServeConfig) -> list[list[str]]:
        """Starts the ranks of the first replicas, pp-major; returns their gRPC addresses, a list per replica that there
        may be: empty where none is yet."""
        ...

    def start_scheduler(self, config: ServeConfig, workers: list[list[str]]) -> str:
        """Starts the scheduler, which loads the model on the workers; returns its gRPC address."""
        ...

    def replace_workers(self, config: ServeConfig, replica: int) -> list[str]:
        """Ends what is left of a replica's workers, if it had any, and starts new ones, when there is room for them.
        Returns their addresses. May run in several threads, one per replica."""
        ...

    def waiting_for_room(self) -> dict[int, str]:
        """Replicas for whose workers `replace_workers` finds no room yet, and what is missing."""
        ...

    def stop_workers(self, replica: int) -> None:
        """Ends the workers of a replica that takes no part any more, or its wait for room, which fails then."""
        ...

    def end_standby(self) -> None:
        """Ends processes that stand by for workers: they have imported the code that there was when they were started.
        Others come in their place when a replica gets new workers."""
        ...

    def replace_scheduler(self, config: ServeConfig, workers: list[list[str]]) -> None:
        """Ends the scheduler if it still lives, and starts another at the same address for the workers as they are."""
        ...

    def replace_frontend(self, config: ServeConfig, index: int) -> None:
        """Starts a frontend in the place of one that has died, with the same ports."""
        ...

    def stop_frontend(self, index: int) -> None:
        """Ends what is left of a frontend that is not to serve: one that is stopped or stuck would still be given
        connections."""
        ...

    def renew_frontend(self, config: ServeConfig, index: int) -> None:
        """Starts another frontend beside one that serves, with the same ports; that one takes no more connections then,
        and ends when it has answered those who are connected. Returns when the new one serves."""
        ...

    def prepare_frontends(self, config: ServeConfig) -> None:
        """Starts the frontend processes, which get ready on their own while the model loads."""
        ...

    def open_frontends(self, config: ServeConfig, scheduler: str) -> FrontendAddress:
        """Lets the frontends connect and listen; they share one pair of ports."""
        ...

    def deaths(self) -> list[Death]:
        """Processes that have ended by themselves and have not been replaced."""
        ...

    def stop(self, grace_s: float) -> None:
        """Ends everything it started. Frontends get `grace_s` to finish their streams. May be called twice."""
        ...


def ray_address(config: ServeConfig) -> str | None:
    """The Ray cluster to join; None when a local one is to be started."""
    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address or None


def cores_per_worker(num_cores: int, num_workers: int) -> int:
    """Threads each CPU worker may use: more threads than cores make every layer many times slower."""
    return max(1, num_cores // max(1, num_workers))


def cpu_worker_env(num_threads: int) -> dict[str, str]:
    """Environment of a worker that computes on the CPU; OpenMP reads it when torch is loaded.

    A thread that waits for the others may spin for some microseconds and must then sleep: asleep at once costs nearly
    twice the time per token on an idle host, and long spins cost it beside other work, how much varies from run to run
    (`bench/cpu_wait.py` measures both). No GPU is visible: a worker takes one where it sees one.
    """
    return {"OMP_NUM_THREADS": str(num_threads), "GOMP_SPINCOUNT": "1000", "CUDA_VISIBLE_DEVICES": ""}
