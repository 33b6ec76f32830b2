"""What is done for tenants that ask for little, under the "fair" policy."""

import pytest

from tests.support.deployment import Deployment, capacity, request


def noisy_beside_light(**fields: int) -> Deployment:
    """Its one replica has a long queue of a tenant, and has served a request of another one lately."""
    shape = capacity(
        **{"num_blocks": 512, "max_num_batched_tokens": 600, "max_num_seqs": 16, "max_model_len": 640} | fields
    )
    deployment = Deployment(shape, policy="fair", enable_prefix_caching=False)
    for id in range(100):
        deployment.add(request(id, 250, 12, tenant="noisy"))
    for _ in range(6):
        deployment.step()
    deployment.add(request(1000, 300, 2, tenant="light"))
    while 1000 not in deployment.finished:
        deployment.step()
    return deployment


def test_steps_of_others_are_short_and_one_at_a_time_while_a_light_tenant_is_there() -> None:
    deployment = noisy_beside_light()
    for _ in range(10):
        plan = deployment.send()
        assert plan is not None
        assert plan.num_tokens <= 256
        assert (
            deployment.send() is None
            or sum(step.num_tokens for step in deployment.scheduler._replicas[0].in_flight) <= 256
        )
        deployment.deliver()
        deployment.deliver()


def test_steps_are_full_and_two_at_a_time_where_tenants_are_alike() -> None:
    shape = capacity(num_blocks=2048, max_num_batched_tokens=600, max_num_seqs=32, max_model_len=640)
    deployment = Deployment(shape, policy="fair")
    for id in range(40):
        deployment.add(request(id, 500, 2, tenant="ab"[id % 2]))
    for _ in range(4):
        deployment.step()
    first, second = deployment.send(), deployment.send()
    assert first is not None
    assert second is not None
    assert first.num_tokens + second.num_tokens > 1000


def test_a_light_tenants_prompt_has_the_next_step_to_itself() -> None:
    deployment = noisy_beside_light()
    deployment.send()
    deployment.add(request(1001, 500, 2, tenant="light"))
    plan = deployment.send()
    if plan is None:  # what is in flight is long enough
        deployment.deliver()
        plan = deployment.send()
    assert plan is not None
    assert [len(add.tokens) for add in plan.adds] == [500]
    assert plan.num_tokens - plan.num_decodes == 500


@pytest.mark.parametrize("fields", [{"max_num_seqs": 8}, {"num_blocks": 260}])
def test_a_light_tenant_finds_room_where_slots_or_blocks_are_taken(fields: dict[str, int]) -> None:
    deployment = noisy_beside_light(**fields)
    for _ in range(30):
        deployment.step()
    deployment.add(request(1001, 100, 2, tenant="light"))
    num_steps = 0
    while not deployment.tokens[1001]:
        deployment.step()
        num_steps += 1
    assert num_steps <= 2
    deployment.run()
    deployment.assert_all_as_alone()


def test_others_give_up_their_blocks_for_a_light_tenant() -> None:
    """Those that run have grown into all there are before it came."""
    deployment = Deployment(capacity(num_blocks=64, max_num_seqs=8), policy="fair", enable_prefix_caching=False)
    for id in range(5):
        deployment.add(request(id, 10, 50, tenant="noisy"))
    while deployment.scheduler.num_free_blocks() > 4:
        deployment.step()
    deployment.add(request(10, 24, 4, tenant="light"))
    for _ in range(3):
        deployment.step()
    assert deployment.tokens[10]
    assert deployment.scheduler.counters.num_preemptions == 1
    deployment.run()
    deployment.assert_all_as_alone()


def test_who_is_light_is_preempted_after_all_others() -> None:
    deployment = Deployment(capacity(num_blocks=16, max_num_seqs=8), policy="fair", enable_prefix_caching=False)
    for id in range(4):
        deployment.add(request(id, 4, 40, tenant="noisy"))
    for _ in range(4):
        deployment.step()
    deployment.add(request(10, 4, 12, tenant="light"))
    while 10 not in deployment.finished:
        deployment.step()
    assert deployment.scheduler.counters.num_preemptions
    assert sum(len(deployment.tokens[id]) for id in range(4)) > 12
    deployment.run()
    deployment.assert_all_as_alone()


def test_a_light_tenant_goes_where_it_waits_least() -> None:
    """It does not wait for the replica with less to do, when another one asks first."""
    shape = capacity(num_blocks=2048, max_num_batched_tokens=600, max_num_seqs=64, max_model_len=640)
    deployment = Deployment(shape, shape, policy="fair", enable_prefix_caching=False)
    for id in range(60):
        deployment.add(request(id, 250, 12, tenant="noisy"))
    for step in range(8):
        deployment.step(step % 2)
    deployment.add(request(1000, 300, 2, tenant="light"))
    busiest = max((0, 1), key=deployment.scheduler.num_resident)
    deployment.step(busiest)
    assert 1000 in deployment.started


def test_nobody_gives_up_blocks_where_a_light_tenant_cannot_enter() -> None:
    """The replica is about to go, and its blocks are being copied."""
    shape = capacity(num_blocks=64, max_num_seqs=8, max_num_batched_tokens=64)
    deployment = Deployment(shape, shape, policy="fair", enable_prefix_caching=False)
    deployment.close(1)
    for id in range(5):
        deployment.add(request(id, 12, 40, tenant="noisy"))
    while deployment.scheduler.num_free_blocks() > 4:
        deployment.step()
    deployment.scheduler.open_replica(1)
    deployment.scheduler.moves.evacuate(0)
    deployment.begin_moves()
    assert deployment.copies
    deployment.add(request(10, 24, 4, tenant="light"))
    for _ in range(4):
        deployment.step()
        assert not deployment.scheduler.counters.num_preemptions
    deployment.run()
    deployment.assert_all_as_alone()


def test_blocks_that_are_being_copied_are_not_asked_of_anybody() -> None:
    shape = capacity(num_blocks=64, max_num_seqs=8, max_num_batched_tokens=64)
    deployment = Deployment(shape, shape, policy="fair", enable_prefix_caching=False)
    deployment.close(1)
    for id in range(4):
        deployment.add(request(id, 20, 40, tenant="noisy"))
    while deployment.scheduler.num_free_blocks() > 4:
        deployment.step()
    deployment.scheduler.open_replica(1)
    deployment.move(*range(4))
    assert not deployment.scheduler._replicas[0].residents
    deployment.add(request(10, 24, 4, tenant="light"))
    deployment.send(0)
    deployment.run()
    deployment.assert_all_as_alone()
