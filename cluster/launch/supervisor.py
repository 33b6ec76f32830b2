"""Brings a deployment up, keeps watch, takes it down: what `manta serve` does after its flags are read."""

import signal
import sys
import threading
import time
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import FrameType

import grpc

from manta.cluster.doors.startup import check_doors
from manta.cluster.launch.keeper import Keeper
from manta.cluster.launch.launcher import FrontendAddress, Launcher, LaunchError, ray_address
from manta.cluster.launch.local import LocalLauncher, local_gpus
from manta.cluster.launch.ready import ready_block
from manta.cluster.preflight import check, with_absolute_paths
from manta.configs.schema import ServeConfig
from manta.protos import engine_pb2, engine_pb2_grpc

_WATCH_INTERVAL_S = 0.25
_INFO_TIMEOUT_S = 10.0
_TELL_AFTER_S = 5.0  # so long nobody wonders
_LONG_PHASES = {
    "ray": "starting Ray",
    "processes": "waiting for the processes of the workers",
    "model": "loading the model (the first start on a machine also compiles kernels)",
}


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM while the deployment was still coming up."""


class Supervisor:
    """One deployment from start to end. The first Ctrl-C or SIGTERM drains; a second one cuts. SIGUSR1, once it serves,
    starts its parts anew one after the other."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = with_absolute_paths(config)
        self._stop = threading.Event()
        self._wakes: SimpleQueue[None] = SimpleQueue()  # there may be something to look at before it is time again
        self._is_up = False
        self._rolls = False  # SIGUSR1 has come
        self._workers: list[list[str]] = []  # addresses by replica and rank
        self._keeper: Keeper | None = None
        self._phases: dict[str, float] = {}
        self._started_s = time.perf_counter()

    def run(self) -> int:
        """Serves until told to stop. Returns the exit code; raises LaunchError or PreflightError with one sentence."""
        self._handle_signals()
        launcher: Launcher | None = None
        try:
            launcher = self._connect()
            scheduler, address = self._bring_up(launcher)
            self._is_up = True
            print(ready_block(self._config, self._info(scheduler), address, self._phases), flush=True)
            why = self._watch(launcher, scheduler)
            if why:
                print(f"manta: error: {why}", file=sys.stderr, flush=True)
                return 1
            print("manta: draining; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)
            self._is_up = False
            launcher.stop(self._config.shutdown_timeout)
            return 0
        except _Interrupted:
            print("manta: stopped", file=sys.stderr, flush=True)
            return 130
        finally:
            self._ignore_signals()
            if launcher is not None:
                launcher.stop(0.0)
            if self._keeper is not None:
                self._keeper.close()
            self._disconnect()

    def _connect(self) -> Launcher:
        joins = self._config.distributed_executor_backend == "ray" and ray_address(self._config) is not None
        # Only the cluster that is joined knows whether it has GPUs: host memory is checked when it has said so.
        self._check(on_gpu=joins or bool(local_gpus()))
        if self._config.distributed_executor_backend == "local":
            return LocalLauncher(self._wake)
        from manta.cluster.launch import on_ray, ray_cluster

        with self._timed("ray"):
            ray_cluster.connect(self._config)
        self._handle_signals()  # again: Ray's own handler of SIGTERM would end this process in the midst of streams
        if joins and not ray_cluster.has_gpus():
            self._check(on_gpu=False)
        return on_ray.RayLauncher(self._wake)

    def _check(self, on_gpu: bool) -> None:
        check(self._config, on_gpu=on_gpu and self._config.device != "cpu")
        check_doors(self._config)

    def _bring_up(self, launcher: Launcher) -> tuple[str, FrontendAddress]:
        with self._timed("processes"):
            workers = self._workers = launcher.start_workers(self._config)
            launcher.prepare_frontends(self._config)
        with self._timed("model"):
            scheduler = launcher.start_scheduler(self._config, workers)
        with self._timed("frontends"):
            address = launcher.open_frontends(self._config, scheduler)
        self._phases["total"] = time.perf_counter() - self._started_s
        return scheduler, address

    def _info(self, scheduler: str) -> engine_pb2.InfoResponse:
        with grpc.insecure_channel(scheduler) as channel:
            stub = engine_pb2_grpc.EngineStub(channel)
            try:
                info: engine_pb2.InfoResponse = stub.GetInfo(engine_pb2.InfoRequest(), timeout=_INFO_TIMEOUT_S)
            except grpc.RpcError as error:
                why = error.details() if isinstance(error, grpc.Call) else error
                raise LaunchError(f"the scheduler has started but does not answer: {why}") from None
            return info

    def _watch(self, launcher: Launcher, scheduler: str) -> str | None:
        """Returns None when told to stop, or why the deployment cannot go on."""
        keeper = self._keeper = Keeper(self._config, launcher, scheduler, self._workers)
        try:
            while not self._stop.is_set():
                if self._rolls:
                    self._rolls = False
                    keeper.roll()
                if why := keeper.look():
                    return why
                with suppress(Empty):
                    self._wakes.get(timeout=_WATCH_INTERVAL_S)
            return None
        finally:
            keeper.end()

    def _timed(self, phase: str) -> "_Timed":
        return _Timed(self._phases, phase)

    def _handle_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGUSR1, self._on_roll)

    def _ignore_signals(self) -> None:
        """Taking down must finish: what an impatient Ctrl-C would cut short is what leaves processes behind."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_up:
            self._stop.set()
            self._wake()
        else:
            raise _Interrupted

    def _on_roll(self, number: int, frame: FrameType | None) -> None:
        if self._is_up:  # while it comes up or goes down, there is nothing to start anew
            self._rolls = True
            self._wake()

    def _wake(self) -> None:
        self._wakes.put(None)

    def _disconnect(self) -> None:
        if "ray" in sys.modules:
            import ray

            if ray.is_initialized():
                ray.shutdown()


class _Timed:
    """Adds the seconds a block took to a table of phases, and says what takes long."""

    def __init__(self, phases: dict[str, float], name: str) -> None:
        self._phases, self._name = phases, name
        self._telling = threading.Timer(_TELL_AFTER_S, self._tell)
        self._telling.daemon = True

    def _tell(self) -> None:
        print(f"manta: {_LONG_PHASES[self._name]}", file=sys.stderr, flush=True)

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()
        if self._name in _LONG_PHASES:
            self._telling.start()

    def __exit__(self, *exc: object) -> None:
        self._telling.cancel()
        self._phases[self._name] = time.perf_counter() - self._start_s
