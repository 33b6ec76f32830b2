"""Which replicas are added and taken away, beside repairs and those that are given up."""

from collections.abc import Callable

import pytest

from manta.protos import engine_pb2 as pb
from tests.support.keeper_world import World


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
