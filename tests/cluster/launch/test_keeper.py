"""What is started again, in which order, and when it is given up; processes and the scheduler are stand-ins."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

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


@pytest.fixture
def make() -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def new(**config: object) -> World:
        worlds.append(World(**config))
        return worlds[-1]

    yield new
    for world in worlds:
        world.close()


def test_where_all_is_well_nothing_is_done(make: Callable[..., World]) -> None:
    world = make()
    for _ in range(3):
        assert world.keeper.look() is None
    assert world.engine.done == []


def test_a_dead_worker_and_a_lost_replica_get_new_workers(make: Callable[..., World]) -> None:
    world = make()
    world.launcher.dead["worker", 1] = "worker 1 was killed"
    world.look_until(lambda: len(world.engine.done) == 1)
    world.settle()
    world.engine.replicas[0].state = pb.ReplicaLoad.LOST
    world.look_until(lambda: len(world.engine.done) == 2)
    world.settle()
    assert world.engine.done == ["replica 1 gets new:1", "replica 0 gets new:2"]
    assert world.over is None


def test_a_dead_scheduler_is_started_for_the_workers_that_there_are_by_then(make: Callable[..., World]) -> None:
    world = make()
    world.launcher.may_start.clear()
    world.launcher.dead["worker", 1] = world.launcher.dead["scheduler", 0] = "killed"
    world.look_until(lambda: len(world.keeper._repairs.jobs) == 2)
    assert world.engine.done == []
    world.launcher.may_start.set()
    world.look_until(lambda: len(world.engine.done) == 2)
    world.settle()
    assert world.engine.done == ["scheduler for [['old:0'], ['new:1']]", "replica 1 gets new:1"]


def test_a_scheduler_that_found_no_workers_to_go_on_with_gets_new_ones(
    make: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manta.cluster.launch.repairs._RETRY_S", 0.0)
    world = make()
    world.launcher.errors = ["all ranks are in the midst of another scheduler's steps"]
    world.launcher.dead["scheduler", 0] = "killed"
    world.look_until(lambda: bool(world.engine.done))
    world.settle()
    assert world.engine.done == ["scheduler for [['new:2'], ['old:1']]"]


def test_workers_that_die_while_they_wait_for_the_scheduler_are_renewed(
    make: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler loads the model on them: it cannot start without, and they are not repaired before it has."""
    monkeypatch.setattr("manta.cluster.launch.repairs._RETRY_S", 0.01)
    world = make(data_parallel_size=1)
    launcher = world.launcher
    launcher.dead["worker", 0] = launcher.dead["scheduler", 0] = "killed"
    start = launcher.replace_scheduler

    def fails_once(config: ServeConfig, workers: list[list[str]]) -> None:
        if workers == [["new:1"]]:
            launcher.dead["worker", 0] = "killed while it loads"
            raise LaunchError("worker rank 0 at new:1: the process does not answer")
        start(config, workers)

    monkeypatch.setattr(launcher, "replace_scheduler", fails_once)
    world.look_until(lambda: len(world.engine.done) == 2)
    world.settle()
    assert world.engine.done == ["scheduler for [['new:2']]", "replica 0 gets new:2"]


def test_a_dead_scheduler_does_not_wait_for_ever_for_workers_where_there_are_others(
    make: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manta.cluster.launch.repairs._PATIENCE_S", 0.1)
    world = make()
    world.launcher.may_start_workers.clear()
    world.launcher.dead["worker", 1] = world.launcher.dead["scheduler", 0] = "killed"
    world.look_until(lambda: bool(world.engine.done))
    assert world.engine.done == ["scheduler for [['old:0'], ['old:1']]"]
    world.launcher.may_start_workers.set()
    world.look_until(lambda: len(world.engine.done) == 2)
    world.settle()
    assert world.engine.done[1] == "replica 1 gets new:2"


def test_a_dead_scheduler_does_not_wait_for_workers_without_room(
    make: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manta.cluster.launch.repairs._PATIENCE_S", 1000.0)
    world = make()
    world.launcher.no_room[1] = "none"
    world.launcher.dead["worker", 1] = "its node is gone"
    world.look_until(lambda: 1 in world.launcher.waiting_for_room())
    world.launcher.dead["scheduler", 0] = "killed"
    world.look_until(lambda: any(each.startswith("scheduler for") for each in world.engine.done))
    world.launcher.stop_workers(1)


def test_what_was_seen_before_a_repair_ended_begins_no_other(make: Callable[..., World]) -> None:
    world = make()
    world.launcher.may_start.clear()
    world.engine.replicas[0].state = pb.ReplicaLoad.LOST
    world.look_until(lambda: bool(world.keeper._repairs.jobs))
    (repair,) = world.keeper._repairs._threads.values()

    def end_repair() -> None:
        world.launcher.may_start.set()
        repair.join(20)

    world.engine.before_answer = end_repair
    world.keeper.look()
    world.engine.before_answer = lambda: None
    assert not world.keeper._repairs.jobs
    world.keeper.look()
    assert world.engine.done == ["replica 0 gets new:1"]


@pytest.mark.parametrize(("load", "num_calls"), [(0.0, 3), (1000.0, 12)])
def test_a_silent_scheduler_is_replaced_later_where_the_host_is_busy(
    make: Callable[..., World], monkeypatch: pytest.MonkeyPatch, load: float, num_calls: int
) -> None:
    monkeypatch.setattr("manta.cluster.launch.keeper._CALL_TIMEOUT_S", 0.05)
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    world = make()
    world.engine.silent = True
    for _ in range(num_calls - 1):
        world.keeper.look()
    world.settle()
    assert world.engine.done == []
    world.keeper.look()
    world.settle()
    assert world.engine.done == ["scheduler for [['old:0'], ['old:1']]"]


def test_a_dead_frontend_is_replaced(make: Callable[..., World]) -> None:
    world = make(api_server_count=2)
    world.launcher.dead["frontend", 1] = "killed"
    world.look_until(lambda: bool(world.engine.done))
    world.settle()
    assert world.engine.done == ["frontend 1"]


def test_what_dies_too_often_within_a_minute_is_given_up(make: Callable[..., World]) -> None:
    world = make(data_parallel_size=1)
    for now_s in (0.0, 50.0, 70.0):  # never three times in 60 s
        world.now_s = now_s
        world.launcher.dead["worker", 0] = "worker 0 was killed"
        world.look_until(lambda: not world.launcher.dead)
        world.settle()
        assert world.over is None
    world.now_s = 90.0
    world.launcher.dead["worker", 0] = "worker 0 was killed"
    world.look_until(lambda: world.over is not None)
    assert world.over == "worker 0 was killed (3 times within 60 s)"
    assert world.engine.done[-1] == f"replica 0 is given up: {world.over}"


def test_failures_that_requests_are_to_blame_for_do_not_count(make: Callable[..., World]) -> None:
    """The scheduler says so; a failure of the replica's own still counts."""
    world = make(data_parallel_size=1)
    for num_excused in (0, 1, 2, 3, 4, 4):
        world.now_s += 1.0
        world.engine.replicas[0].num_excused = num_excused
        world.launcher.dead["worker", 0] = "worker 0 was killed"
        world.look_until(lambda: not world.launcher.dead)
        world.settle()
        assert world.over is None
    world.engine.replicas[0].num_excused = 4
    world.launcher.dead["worker", 0] = "worker 0 was killed"
    world.look_until(lambda: world.over is not None)
    assert world.over == "worker 0 was killed (3 times within 60 s)"


def test_a_frontend_that_is_given_up_takes_no_connections(make: Callable[..., World]) -> None:
    """One that a signal has stopped would still be given some."""
    world = make(api_server_count=2, restart_limit=1)
    world.launcher.dead["frontend", 1] = "frontend 1 has been stopped by a signal"
    world.look_until(lambda: ("frontend", 1) in world.keeper._repairs.failures.given_up)
    world.settle()
    assert world.engine.done == ["frontend 1 ends"]
    assert world.over is None


def test_others_go_on_when_one_is_given_up(make: Callable[..., World]) -> None:
    world = make(restart_limit=1)
    world.launcher.dead["worker", 0] = "worker 0 was killed"
    world.look_until(lambda: bool(world.engine.done))
    world.settle()
    assert world.engine.done == ["workers 0 end", "replica 0 is given up: worker 0 was killed"]
    assert world.keeper.look() is None
    assert len(world.engine.done) == 2


def test_who_is_given_up_is_tried_again_after_a_rest_that_grows(make: Callable[..., World]) -> None:
    world = make(restart_limit=1)
    world.launcher.dead["worker", 0] = "worker 0 was killed"
    world.look_until(lambda: len(world.engine.done) == 2)
    world.settle()
    for wait_s, error in ((60.0, "no GPU"), (120.0, "still no GPU"), (240.0, "")):
        world.engine.done.clear()
        world.launcher.errors = [error] if error else []
        world.now_s += wait_s - 1
        world.keeper.look()
        assert not world.keeper._repairs.jobs, "it rests"
        world.now_s += 1
        world.keeper.look()
        world.settle()
        if error:
            assert world.engine.done == ["workers 0 end", f"replica 0 is given up: {error}"]
    assert world.engine.done == ["replica 0 gets new:3"]
    assert world.over is None
    assert not world.keeper._repairs.failures.given_up


def test_a_scheduler_in_the_place_of_another_hears_who_is_given_up(make: Callable[..., World]) -> None:
    world = make(restart_limit=2)
    for _ in range(2):
        world.launcher.dead["worker", 0] = "worker 0 was killed"
        world.look_until(lambda: not world.launcher.dead)
        world.settle()
    world.engine.done.clear()
    world.launcher.dead["scheduler", 0] = "killed"
    world.engine.replicas[0].state = pb.ReplicaLoad.ABSENT
    world.look_until(lambda: len(world.engine.done) == 2)
    world.settle()
    reason = "worker 0 was killed (2 times within 60 s)"
    assert world.engine.done == ["scheduler for [[], ['old:1']]", f"replica 0 is given up: {reason}"]


def test_others_are_added_while_one_is_started_again(make: Callable[..., World]) -> None:
    world = make(data_parallel_size=1, min_replicas=1, max_replicas=3, max_num_seqs=10)
    for replica in (1, 2):
        world.engine.replicas[replica].state = pb.ReplicaLoad.ABSENT
    world.engine.replicas[0].state = pb.ReplicaLoad.LOST
    world.launcher.may_start_workers.clear()
    world.keeper.look()
    assert world.keeper._repairs.jobs == {("worker", 0): "start"}
    world.engine.num_waiting = 20
    world.keeper.look()
    world.now_s = 2.0
    world.keeper.look()
    assert world.keeper._repairs.jobs.keys() == {("worker", replica) for replica in range(3)}
    world.now_s = 10.0
    world.keeper.look()  # those on the way are counted
    world.launcher.may_start_workers.set()
    world.settle()
    assert sorted(each[:14] for each in world.engine.done) == [f"replica {i} gets" for i in range(3)]


def test_who_waits_for_room_is_no_failure_and_goes_first(
    make: Callable[..., World], capfd: pytest.CaptureFixture[str]
) -> None:
    world = make(data_parallel_size=1, min_replicas=1, max_replicas=2, max_num_seqs=10)
    world.engine.replicas[1].state = pb.ReplicaLoad.ABSENT
    world.launcher.no_room[1] = ""
    world.engine.num_waiting = 20
    world.keeper.look()
    world.now_s = 2.0
    world.look_until(lambda: bool(world.launcher.waiting_for_room()))
    for _ in range(3):
        world.now_s += 31.0
        world.keeper.look()
    assert world.engine.done == []
    assert capfd.readouterr().err.count("replica 1 waits: no room") == 2  # the first time, and a minute later
    world.engine.num_waiting = 0
    world.keeper.look()
    world.now_s += 121.0
    world.look_until(lambda: "replica 1 retires" in world.engine.done)
    world.settle()
    assert world.engine.done[0] == "workers 1 end"
    assert not world.keeper._repairs.failures.given_up


def test_a_replica_that_is_given_up_comes_back_when_the_load_asks_for_it(make: Callable[..., World]) -> None:
    world = make(data_parallel_size=1, min_replicas=1, max_replicas=2, max_num_seqs=10, restart_limit=1)
    world.engine.replicas[1].state = pb.ReplicaLoad.ABSENT
    world.launcher.dead["worker", 0] = "worker 0 was killed"
    world.look_until(lambda: "replica 1 gets new:1" in world.engine.done)
    world.settle()
    assert world.engine.done[:2] == ["workers 0 end", "replica 0 is given up: worker 0 was killed"]
    world.now_s = 61.0
    world.keeper.look()
    assert not world.keeper._repairs.jobs
    world.engine.num_waiting = 20
    world.keeper.look()
    world.now_s = 63.0
    world.look_until(lambda: "replica 0 gets new:2" in world.engine.done)
    world.settle()
    assert not world.keeper._repairs.failures.given_up


@pytest.mark.parametrize("where", ["launcher", "engine"])
def test_what_cannot_be_started_is_given_up(
    make: Callable[..., World], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manta.cluster.launch.repairs._RETRY_S", 0.0)
    world = make(data_parallel_size=1)
    if where == "launcher":
        world.launcher.errors = ["no room"] * 3
    else:
        world.engine.refuses = "no room"
    world.launcher.dead["worker", 0] = "killed"
    world.look_until(lambda: world.over is not None)
    assert world.over == "no room"
    assert world.engine.done[-1] == "replica 0 is given up: no room"


def test_replicas_come_and_go_with_the_load(make: Callable[..., World]) -> None:
    world = make(data_parallel_size=1, min_replicas=0, max_replicas=3, max_num_seqs=10)
    for replica in (1, 2):
        world.engine.replicas[replica].state = pb.ReplicaLoad.ABSENT
    world.engine.num_waiting = 20
    world.keeper.look()
    assert world.engine.done == []
    world.now_s = 2.0
    world.look_until(lambda: len(world.engine.done) == 2)
    world.settle()
    assert sorted(each[:14] for each in world.engine.done) == ["replica 1 gets", "replica 2 gets"]
    world.engine.done.clear()
    world.engine.num_waiting = 0
    for number in (2, 1, 0):
        world.keeper.look()
        world.now_s += 121
        world.look_until(lambda number=number: f"workers {number} end" in world.engine.done)
        world.settle()
    # Dead while idle: there is no worker that a new scheduler could ask.
    world.launcher.dead["scheduler", 0] = "killed"
    world.engine.done.clear()
    world.look_until(lambda: bool(world.engine.done))
    world.settle()
    assert world.engine.done == ["scheduler for [['new:3'], [], []]"]


def test_all_parts_are_started_anew_one_after_the_other(make: Callable[..., World]) -> None:
    """What a replica has goes to others before its workers end; a frontend is there before the old one goes."""
    world = make(api_server_count=2, max_replicas=3, min_replicas=2, data_parallel_size=2)
    world.keeper.roll()
    world.keeper.roll()  # it is under way
    world.look_until(lambda: len(world.engine.done) >= 9)
    world.settle()
    assert world.engine.done == [
        "replica 0 retires", "workers 0 end", "replica 0 gets new:1",
        "replica 1 retires", "workers 1 end", "replica 1 gets new:2",
        "scheduler for [['new:1'], ['new:2'], []]",
        "frontend 0 beside the old one", "frontend 1 beside the old one",
    ]  # fmt: skip


def test_what_was_taken_away_during_a_rolling_restart_stays_away(make: Callable[..., World]) -> None:
    world = make(data_parallel_size=2)
    world.launcher.may_start_workers.clear()
    world.keeper.roll()
    jobs, rolling = world.keeper._repairs, world.keeper._rolling
    world.look_until(lambda: "workers 0 end" in world.engine.done)
    with jobs.changed:
        jobs.retire(1)
    world.look_until(lambda: ("worker", 1) not in jobs.jobs)
    world.launcher.may_start_workers.set()
    world.look_until(lambda: rolling is not None and rolling.is_over)
    assert "replica 0 gets new:1" in world.engine.done
    assert not any(each.startswith("replica 1 gets") for each in world.engine.done)


def test_a_part_that_does_not_start_anew_ends_the_rolling_restart(
    make: Callable[..., World], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("manta.cluster.launch.repairs._RETRY_S", 0.01)
    world = make()
    world.launcher.errors = ["no such file"] * 3
    world.keeper.roll()
    rolling = world.keeper._rolling
    world.look_until(lambda: rolling is not None and rolling.is_over)
    assert "replica 1 retires" not in world.engine.done
    assert "ends before its time: replica 0 does not serve" in capsys.readouterr().err


def test_a_scheduler_is_left_alone_where_all_is_being_taken_down(make: Callable[..., World]) -> None:
    """Streams end over one that serves, as in a rolling restart."""
    world = make()
    world.launcher.may_start_workers.clear()
    world.launcher.dead["worker", 0] = "killed"
    repairs = world.keeper._repairs
    world.look_until(lambda: ("worker", 0) in repairs.jobs)
    with repairs.changed:
        repairs.renew(("scheduler", 0))
        renewal = repairs._threads["scheduler", 0]
    world.keeper.end()
    renewal.join(20)
    assert not renewal.is_alive()
    world.launcher.may_start_workers.set()
    assert not any(each.startswith("scheduler for") for each in world.engine.done)


def test_closing_ends_a_repair(make: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manta.cluster.launch.repairs._RETRY_S", 20.0)
    world = make()
    world.launcher.errors = ["no room"]
    world.launcher.dead["worker", 0] = "killed"
    world.look_until(lambda: not world.launcher.errors)
    threads = list(world.keeper._repairs._threads.values())
    world.keeper.close()
    assert not any(thread.is_alive() for thread in threads)
