"""Pipeline lanes, and one queue for several replicas."""

import pytest

from tests.support.deployment import Deployment, capacity, request


@pytest.mark.parametrize("num_lanes", [2, 3])
def test_lanes_take_turns_and_share_sequences_evenly(num_lanes: int) -> None:
    deployment = Deployment(capacity(num_lanes=num_lanes, max_num_seqs=6, max_num_batched_tokens=64))
    for id in range(6):
        deployment.add(request(id, 5, max_tokens=9))
    lanes = []
    for _ in range(3 * num_lanes):
        plan = deployment.step()
        assert plan is not None
        lanes.append(plan.lane)
    assert lanes == list(range(num_lanes)) * 3
    joined = [each.lane for each in deployment.scheduler.snapshot().sequences]
    assert all(joined.count(lane) == 6 // num_lanes for lane in range(num_lanes))
    deployment.run()
    deployment.assert_all_as_alone()


def test_a_lane_without_work_is_passed_over() -> None:
    deployment = Deployment(capacity(num_lanes=3))
    deployment.add(request(0, 5, max_tokens=9))
    for num_tokens in range(1, 9):
        plan = deployment.step()
        assert plan is not None
        assert len(deployment.tokens[0]) == num_tokens
    deployment.run()
    deployment.assert_all_as_alone()


def test_a_request_is_bound_to_the_replica_that_has_room_first() -> None:
    deployment = Deployment(capacity(max_num_seqs=1), capacity(max_num_seqs=1))
    for id in range(3):
        deployment.add(request(id, 5, max_tokens=4))
    deployment.step(1)
    deployment.step(0)
    snapshot = deployment.scheduler.snapshot()
    assert [(each.request_id, each.replica) for each in snapshot.sequences] == [(1, 0), (0, 1), (2, -1)]
    while 0 not in deployment.finished:
        deployment.step(1)
    deployment.step(1)
    assert {each.request_id: each.replica for each in deployment.scheduler.snapshot().sequences} == {1: 0, 2: 1}
    deployment.run()
    deployment.assert_all_as_alone()


def test_the_others_take_over_from_a_lost_replica() -> None:
    deployment = Deployment(capacity(), capacity())
    for id in range(3):
        deployment.add(request(id, 5, max_tokens=6))
    deployment.step(0)
    deployment.step(0)
    deployment.reset(0)
    while deployment.scheduler.num_running or deployment.scheduler.num_waiting:
        deployment.step(1)
    deployment.assert_all_as_alone()


def test_blocks_of_one_replica_are_not_found_on_another() -> None:
    deployment = Deployment(capacity(), capacity())
    for replica, id in ((0, 0), (1, 1), (0, 2)):
        deployment.add(request(id, list(range(10)), max_tokens=1))
        while id not in deployment.started:  # for a while request 1 is left to replica 0
            deployment.step(replica)
    assert [deployment.started[id].num_cached_tokens for id in range(3)] == [0, 0, 8]
