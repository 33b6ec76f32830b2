"""What is started again, in which order, and when it is given up; processes and the scheduler are stand-ins."""

from collections.abc import Callable

import pytest

from manta.cluster.launch.launcher import LaunchError
from manta.configs.schema import ServeConfig
from manta.protos import engine_pb2 as pb
from tests.support.keeper_world import World


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
