"""Which replica takes a request: the one that has its prefix, unless another is better off without it."""

import pytest

from tests.support.deployment import Deployment, capacity, request

LONG = [7, 3, 11, 3, 5, 2, 19, 8, 1, 1, 4, 13] * 8  # 96 tokens, 24 blocks


def two_replicas(**overrides: int) -> Deployment:
    """Replica 1 has the blocks of LONG in its prefix index; nothing runs."""
    fields = {"num_blocks": 128, "max_model_len": 256, "max_num_batched_tokens": 64} | overrides
    deployment = Deployment(capacity(**fields), capacity(**fields))
    deployment.add(request(0, LONG, 1))
    while 0 not in deployment.finished:
        deployment.step(1)
    return deployment


def replica_of(deployment: Deployment, id: int) -> int:
    return {each.request_id: each.replica for each in deployment.scheduler.snapshot().sequences}[id]


def test_a_request_goes_where_its_prefix_is() -> None:
    deployment = two_replicas()
    deployment.add(request(1, [*LONG, 5], 4))
    assert deployment.send(0) is None
    assert deployment.scheduler.idle_replicas == {0}
    assert deployment.send(1) is not None
    assert replica_of(deployment, 1) == 1
    deployment.run()
    assert deployment.started[1].num_cached_tokens == 96
    deployment.assert_all_as_alone()


def test_those_behind_go_first_meanwhile() -> None:
    deployment = two_replicas()
    deployment.add(request(1, [*LONG, 5], 4))
    deployment.add(request(2, 5, 4))
    assert deployment.send(0) is not None
    assert (replica_of(deployment, 1), replica_of(deployment, 2)) == (-1, 0)
    deployment.run()
    assert deployment.started[1].num_cached_tokens == 96


def test_nobody_waits_long_for_a_replica_that_does_not_come() -> None:
    deployment = two_replicas()
    deployment.add(request(1, [*LONG, 5], 4))
    num_plans = 0
    while deployment.send(0) is None:
        num_plans += 1
    assert 0 < num_plans <= len(LONG)
    assert replica_of(deployment, 1) == 0


def test_a_busy_replica_passes_over_a_request_no_longer_than_computing_it_takes() -> None:
    deployment = two_replicas(max_num_seqs=2)
    deployment.add(request(1, 5, 60))
    deployment.step(0)
    deployment.add(request(2, [*LONG, 5], 4))
    num_tokens = 0
    while replica_of(deployment, 2) == -1:
        plan = deployment.step(0)
        assert plan is not None
        num_tokens += max(plan.num_tokens, 4)
    assert len(LONG) / 2 < num_tokens - plan.num_tokens <= len(LONG) + 4


def test_an_idle_replica_does_not_wait_for_one_without_room() -> None:
    deployment = two_replicas(max_num_seqs=1)
    deployment.add(request(1, [*LONG, 5], 60))
    deployment.step(1)
    deployment.add(request(2, [*LONG, 6], 4))
    assert deployment.send(0) is not None
    assert replica_of(deployment, 2) == 0


def test_what_is_lost_or_closed_holds_nothing_back() -> None:
    deployment = two_replicas()
    deployment.add(request(1, [*LONG, 5], 4))
    assert deployment.send(0) is None
    deployment.close(1)
    assert deployment.send(0) is not None
    assert deployment.send(1) is None  # nobody is there to compute it
    deployment.run()
    deployment.scheduler.open_replica(1)
    deployment.add(request(2, 5, 4))
    assert deployment.send(1) is not None
    deployment.run()
    deployment.assert_all_as_alone()


def test_many_with_one_prefix_do_not_all_wait_for_one_replica() -> None:
    deployment = two_replicas(max_num_seqs=16)
    for id in range(1, 17):
        deployment.add(request(id, [*LONG, *range(20), *range(20), id], 4))
    deployment.send(0)
    deployment.send(1)
    replicas = [replica_of(deployment, id) for id in range(1, 17)]
    assert replicas.count(0) >= 1
    assert replicas.count(1) >= 1
    deployment.run()
    deployment.assert_all_as_alone()


@pytest.mark.parametrize("loaded", [0, 1])
def test_of_equal_replicas_the_one_with_less_to_compute_is_chosen(loaded: int) -> None:
    deployment = Deployment(*[capacity(num_blocks=128, max_model_len=256, max_num_batched_tokens=32)] * 2)
    deployment.add(request(0, 200, 4))
    deployment.step(loaded)
    deployment.add(request(1, 20, 4))
    deployment.step(loaded)
    deployment.step(1 - loaded)
    assert replica_of(deployment, 1) == 1 - loaded
    deployment.run()
    deployment.assert_all_as_alone()


def test_one_replica_passes_over_nothing() -> None:
    deployment = Deployment(capacity(num_blocks=128, max_model_len=256))
    for id in range(3):
        deployment.add(request(id, LONG[: 20 + id], 3))
        assert deployment.step() is not None
        assert not deployment.scheduler.idle_replicas
    deployment.run()
    deployment.assert_all_as_alone()
