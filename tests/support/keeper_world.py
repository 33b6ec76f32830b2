"""A keeper whose processes and scheduler are stand-ins."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc

from manta.cluster.launch.keeper import Keeper
from manta.cluster.launch.launcher import Death, FrontendAddress, LaunchError, Part
from manta.configs.schema import ServeConfig
from manta.protos import engine_pb2 as pb
from manta.protos import engine_pb2_grpc


class Engine(engine_pb2_grpc.EngineServicer):
    """Believes that its replicas serve until a test says otherwise."""

    def __init__(self, num_replicas: int) -> None:
        self.replicas = [pb.ReplicaLoad() for _ in range(num_replicas)]
        self.done: list[str] = []
        self.num_waiting = 0
        self.refuses = ""
        self.silent = False
        self.may_answer = threading.Event()
        self.before_answer: Callable[[], None] = lambda: None

    def GetLoad(self, request: pb.LoadRequest, context: grpc.ServicerContext) -> pb.LoadResponse:
        if self.silent:
            self.may_answer.wait(20)
        load = pb.LoadResponse(replicas=self.replicas, num_waiting=self.num_waiting)
        self.before_answer()
        return load

    def ReplaceWorkers(
        self, request: pb.ReplaceWorkersRequest, context: grpc.ServicerContext
    ) -> pb.ReplaceWorkersResponse:
        self.done.append(f"replica {request.replica} gets {' '.join(request.workers)}")
        if self.refuses:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refuses)
        self.replicas[request.replica].Clear()
        return pb.ReplaceWorkersResponse()

    def RetireReplica(
        self, request: pb.RetireReplicaRequest, context: grpc.ServicerContext
    ) -> pb.RetireReplicaResponse:
        self.done.append(f"replica {request.replica} retires")
        self.replicas[request.replica].state = pb.ReplicaLoad.ABSENT
        return pb.RetireReplicaResponse()

    def GiveUpReplica(
        self, request: pb.GiveUpReplicaRequest, context: grpc.ServicerContext
    ) -> pb.GiveUpReplicaResponse:
        self.done.append(f"replica {request.replica} is given up: {request.reason}")
        self.replicas[request.replica].state = pb.ReplicaLoad.GIVEN_UP
        return pb.GiveUpReplicaResponse()


class FakeLauncher:
    """Starts at once what a test does not hold back; dead is what the test says."""

    def __init__(self, engine: Engine) -> None:
        self.dead: dict[Part, str] = {}
        self.errors: list[str] = []  # of the next starts
        self.may_start = threading.Event()
        self.may_start.set()
        self.may_start_workers = threading.Event()
        self.may_start_workers.set()
        self.room = threading.Condition()
        self.no_room: dict[int, str] = {}  # replicas for which there is none
        self._engine = engine
        self._num_started = 0

    def _start(self, part: Part) -> int:
        assert self.may_start.wait(20)
        self._num_started += 1
        if self.errors:
            raise LaunchError(self.errors.pop(0))
        self.dead.pop(part, None)
        return self._num_started

    def replace_workers(self, config: ServeConfig, replica: int) -> list[str]:
        assert self.may_start_workers.wait(20)
        with self.room:
            if replica in self.no_room:
                self.no_room[replica] = "is waited for"
                assert self.room.wait_for(lambda: replica not in self.no_room, 20)
                raise LaunchError("they are not wanted any more")
        return [f"new:{self._start(('worker', replica))}"]

    def stop_workers(self, replica: int) -> None:
        self._engine.done.append(f"workers {replica} end")
        self.dead.pop(("worker", replica), None)
        with self.room:
            self.no_room.pop(replica, None)
            self.room.notify_all()

    def end_standby(self) -> None:
        pass

    def waiting_for_room(self) -> dict[int, str]:
        return {replica: "no room" for replica in self.no_room if self.no_room[replica] == "is waited for"}

    def replace_scheduler(self, config: ServeConfig, workers: list[list[str]]) -> None:
        self._start(("scheduler", 0))
        self._engine.silent = False
        self._engine.done.append(f"scheduler for {workers}")

    def replace_frontend(self, config: ServeConfig, index: int) -> None:
        self._start(("frontend", index))
        self._engine.done.append(f"frontend {index}")

    def stop_frontend(self, index: int) -> None:
        self._engine.done.append(f"frontend {index} ends")

    def renew_frontend(self, config: ServeConfig, index: int) -> None:
        self._start(("frontend", index))
        self._engine.done.append(f"frontend {index} beside the old one")

    def deaths(self) -> list[Death]:
        return [Death(reason, part) for part, reason in self.dead.items()]

    def start_workers(self, config: ServeConfig) -> list[list[str]]:
        raise NotImplementedError

    def start_scheduler(self, config: ServeConfig, workers: list[list[str]]) -> str:
        raise NotImplementedError

    def prepare_frontends(self, config: ServeConfig) -> None:
        raise NotImplementedError

    def open_frontends(self, config: ServeConfig, scheduler: str) -> FrontendAddress:
        raise NotImplementedError

    def stop(self, grace_s: float) -> None:
        raise NotImplementedError


class World:
    def __init__(self, **config: object) -> None:
        self.config = ServeConfig.model_validate({"model": "m", "data_parallel_size": 2} | config)
        self.engine = Engine(self.config.max_num_replicas)
        self.launcher = FakeLauncher(self.engine)
        self._server = grpc.server(ThreadPoolExecutor(8))
        engine_pb2_grpc.add_EngineServicer_to_server(self.engine, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        self.now_s = 0.0
        number, at_start = self.config.max_num_replicas, self.config.num_replicas_at_start
        workers = [[f"old:{replica}"] if replica < at_start else [] for replica in range(number)]
        self.keeper = Keeper(self.config, self.launcher, f"127.0.0.1:{port}", workers, clock=lambda: self.now_s)
        self.over: str | None = None

    def look_until(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline_s, f"not in time; done: {self.engine.done}"
            self.over = self.keeper.look()
            time.sleep(0.005)

    def settle(self) -> None:
        """Until no repair is under way."""
        self.look_until(lambda: not self.keeper._repairs.jobs)

    def close(self) -> None:
        self.engine.may_answer.set()
        self.keeper.close()
        self._server.stop(None).wait()
