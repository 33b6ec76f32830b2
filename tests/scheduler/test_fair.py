"""The "fair" policy: tenants get service by weight, and nobody is shut out by another one's queue."""

from collections import Counter

import pytest

from manta.scheduler.fair_queue import FairQueue
from manta.scheduler.scheduler import Scheduler
from manta.scheduler.sequence import Sequence
from manta.scheduler.tenants import TenantMeter
from manta.scheduler.types import QueueFullError
from tests.support.deployment import Deployment, capacity, request


def served(deployment: Deployment, num_steps: int) -> Counter[str]:
    """By tenant: prompt tokens, and tokens of output twice, of two tenants that always have six requests each."""
    sizes = {"a": (5, 9), "b": (11, 3)}
    for _ in range(num_steps):
        open_requests = [told for id, told in deployment.requests.items() if id not in deployment.finished]
        for tenant, (num_prompt, max_tokens) in sizes.items():
            if sum(told.tenant == tenant for told in open_requests) < 6:
                deployment.add(request(len(deployment.requests), num_prompt, max_tokens, tenant=tenant))
        deployment.step()
    service: Counter[str] = Counter()
    for id in deployment.started:
        told = deployment.requests[id]
        service[told.tenant] += len(told.prompt) + 2 * len(deployment.tokens[id])
    return service


@pytest.mark.parametrize(("weights", "ratio"), [({}, 1.0), ({"a": 3.0}, 3.0), ({"a": 1.0, "b": 2.0}, 0.5)])
def test_tenants_that_always_ask_are_served_by_weight(weights: dict[str, float], ratio: float) -> None:
    shape = capacity(num_blocks=64, max_num_seqs=4)
    deployment = Deployment(shape, policy="fair", tenant_weights=weights, enable_prefix_caching=False)
    service = served(deployment, 400)
    assert service["a"] / service["b"] == pytest.approx(ratio, rel=0.05)


def test_a_light_tenant_does_not_wait_behind_a_long_queue() -> None:
    deployment = Deployment(capacity(num_blocks=64), policy="fair")
    for id in range(100):
        deployment.add(request(id, 6, 6, tenant="noisy"))
    for _ in range(20):
        deployment.step()
    deployment.add(request(1000, 6, 6, tenant="light"))
    num_started = len(deployment.started)
    while 1000 not in deployment.started:
        deployment.step()
    assert len(deployment.started) - num_started <= 2
    deployment.run()
    deployment.assert_all_as_alone()


def test_service_is_shared_over_all_replicas() -> None:
    deployment = Deployment(capacity(max_num_seqs=1), capacity(max_num_seqs=1), policy="fair")
    for id in range(4):
        deployment.add(request(id, 5, 8, tenant="noisy"))
    deployment.step(0)  # noisy has a replica
    deployment.add(request(10, 5, 8, tenant="light"))
    deployment.step(1)
    assert 10 in deployment.started


def queued(id: int, tenant: str, meter: TenantMeter, queue: FairQueue) -> Sequence:
    sequence = Sequence.of(request(id, 4, tenant=tenant), id, 64)
    queue.push(sequence)
    return sequence


def test_who_was_away_cannot_claim_what_it_did_not_ask_for() -> None:
    meter = TenantMeter({})
    queue = FairQueue(meter)
    for id in range(3):
        queued(id, "busy", meter, queue)
    meter.charge("busy", 1000)
    for id in range(10, 13):
        queued(id, "back", meter, queue)
    order = []
    while (sequence := queue.peek()) is not None:
        order.append(sequence.request.tenant)
        meter.charge(sequence.request.tenant, 10)
        queue.remove(sequence)
        queue.check()
    assert order in (["busy", "back"] * 3, ["back", "busy"] * 3)


def test_who_lost_its_place_comes_before_the_others_of_its_tenant() -> None:
    meter = TenantMeter({})
    queue = FairQueue(meter)
    first, second = queued(0, "a", meter, queue), queued(1, "a", meter, queue)
    queue.remove(first)
    queued(2, "b", meter, queue)
    meter.charge("a", 5)
    queue.push_front(first)
    queue.check()
    assert [each.request.id for each in queue] == [2, 0, 1]
    assert queue.first([queue.peek()]) is first
    assert queue.first([first, queue.peek()]) is second


def test_a_full_queue_takes_what_is_within_a_tenants_share() -> None:
    scheduler = Scheduler([capacity()], policy="fair", max_num_queued_reqs=4, max_num_queued_tokens=40)
    for id in range(4):
        scheduler.add(request(id, 5, tenant="noisy"))
    with pytest.raises(QueueFullError):
        scheduler.add(request(4, 5, tenant="noisy"))
    scheduler.add(request(5, 5, tenant="light"))
    scheduler.add(request(6, 5, tenant="light"))
    with pytest.raises(QueueFullError):
        scheduler.add(request(7, 5, tenant="light"))
    scheduler.add(request(8, 25, tenant="third"))  # alone of its tenant: later would be no better
    with pytest.raises(QueueFullError):
        scheduler.add(request(9, 25, tenant="third"))
    scheduler.check()


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_weights_are_above_0(weight: float) -> None:
    with pytest.raises(ValueError, match="'a'"):
        Scheduler([capacity()], policy="fair", tenant_weights={"a": weight})


def test_a_light_tenants_prompt_does_not_wait_for_the_rest_of_a_long_one() -> None:
    deployment = Deployment(capacity(num_blocks=256, max_num_batched_tokens=16, max_model_len=512), policy="fair")
    deployment.add(request(2, 4, 60, tenant="noisy"))
    deployment.add(request(0, 400, 4, tenant="noisy"))
    deployment.step()
    deployment.step()
    deployment.add(request(1, 20, 4, tenant="light"))
    deployment.step()
    deployment.step()
    assert len(deployment.tokens[1]) == 1
    assert not deployment.tokens[0]
    deployment.run()
    deployment.assert_all_as_alone()


def test_what_goes_ahead_leaves_the_others_a_part_of_each_step() -> None:
    shape = capacity(num_blocks=1024, max_num_seqs=8, max_num_batched_tokens=16, max_model_len=512)
    deployment = Deployment(shape, policy="fair")
    deployment.add(request(0, 64, 4, tenant="noisy"))
    deployment.step()
    for id in range(1, 100):  # a tenant that always has a prompt to compute, and nothing that runs for long
        deployment.add(request(id, 12, 1, tenant="light"))
        deployment.step()
        if deployment.tokens[0]:
            break
    assert id <= 64 // 4
    deployment.run()
    deployment.assert_all_as_alone()
