"""What tenants are charged under the "fair" policy, against what clients were told."""

from collections import Counter

import numpy as np
import pytest

from manta.scheduler.beam_search import BeamParams
from tests.support.deployment import Deployment, capacity, pooled, request
from tests.support.fake_worker import Asking


def charged(deployment: Deployment, tenant: str) -> float:
    meter = deployment.scheduler._replicas[0].meter
    assert meter is not None
    return float(meter.service[meter.number(tenant)])


def without_lifts(deployment: Deployment) -> None:
    """So that the counters are what was charged and nothing else."""
    meter = deployment.scheduler._replicas[0].meter
    assert meter is not None
    meter.lift = lambda number, level: None  # type: ignore[method-assign]


def told(deployment: Deployment) -> Counter[str]:
    """By tenant: prompt tokens that were not cached, once for all samples of a prompt, and tokens of output twice."""
    service: Counter[str] = Counter()
    for id, started in deployment.started.items():
        told = deployment.requests[id]
        if not started.is_follower:
            service[told.tenant] += len(told.prompt) - started.num_cached_tokens
        service[told.tenant] += 2 * len(deployment.tokens[id])
    return service


@pytest.mark.parametrize("seed", range(8))
def test_tenants_are_charged_for_what_they_get_once(seed: int) -> None:
    """Pools so small that sequences are preempted, lost replicas, samples, vectors, shared prefixes."""
    rng = np.random.default_rng(seed)
    shapes = [capacity(num_blocks=int(rng.integers(18, 26)), max_num_seqs=6)] * int(rng.integers(1, 4))
    weights = {"a": 2.0, "b": 0.5}
    deployment = Deployment(*shapes, policy="fair", tenant_weights=weights)
    without_lifts(deployment)
    prefix = rng.integers(0, 20, 12).tolist()
    for id in range(0, 120, 4):
        tenant = "abc"[int(rng.integers(3))]
        prompt = prefix[: int(rng.integers(13))] + rng.integers(0, 20, int(rng.integers(1, 20))).tolist()
        match int(rng.integers(4)):
            case 0:
                deployment.add(pooled(id, prompt, "last", tenant=tenant))
            case 1:
                group = [request(id + i, prompt, 8, tenant=tenant) for i in range(3)]
                deployment.add_group(group)
            case _:
                deployment.add(request(id, prompt, int(rng.integers(1, 24)), tenant=tenant))
        for _ in range(int(rng.integers(4))):
            replica = int(rng.integers(len(shapes)))
            deployment.send(replica)
            deployment.deliver(replica)
        if not rng.integers(8):
            deployment.reset(int(rng.integers(len(shapes))))
    deployment.run()
    deployment.assert_all_as_alone()
    for tenant, service in told(deployment).items():
        assert charged(deployment, tenant) == pytest.approx(service / weights.get(tenant, 1.0))


def test_preempted_sequences_are_charged_once() -> None:
    deployment = Deployment(capacity(num_blocks=8, max_model_len=28), policy="fair")
    without_lifts(deployment)
    for id in range(6):
        deployment.add(request(id, 9, 16, tenant="ab"[id % 2]))
    deployment.run()
    assert deployment.scheduler.counters.num_preemptions > 3
    for tenant in "ab":
        assert charged(deployment, tenant) == 3 * (9 + 2 * 16)


def test_every_beam_is_charged() -> None:
    deployment = Deployment(capacity(), policy="fair")
    asking = Asking(num_logprobs=4, searches=True)
    deployment.add_search([request(0, 7, 5, sampling=asking, tenant="a")], BeamParams(3, 4))
    num_sampled = 0
    while 0 not in deployment.finished:
        deployment.send()
        for step in deployment.scheduler._replicas[0].in_flight:
            num_sampled += step.num_sampled
        deployment.deliver()
    assert num_sampled > 3 * 3
    assert charged(deployment, "a") == 7 + 2 * num_sampled


def test_weights_hold_over_all_replicas() -> None:
    """Whichever replica serves whom, twice the weight is twice the tokens."""
    deployment = Deployment(
        *[capacity(num_blocks=64, max_num_seqs=3)] * 3,
        policy="fair",
        tenant_weights={"a": 2.0},
        enable_prefix_caching=False,
    )
    rng = np.random.default_rng(0)
    for _ in range(500):
        for tenant in "ab":
            num_open = sum(
                each.tenant == tenant for id, each in deployment.requests.items() if id not in deployment.finished
            )
            for _ in range(12 - num_open):
                sizes = int(rng.integers(2, 12)), int(rng.integers(1, 9))
                deployment.add(request(len(deployment.requests), *sizes, tenant=tenant))
        deployment.step(int(rng.integers(3)))
    service = told(deployment)
    assert service["a"] / service["b"] == pytest.approx(2, rel=0.05)


def test_a_tenant_that_was_idle_gets_no_more_than_a_bounded_lead() -> None:
    shape = capacity(num_blocks=64, max_num_seqs=4)
    deployment = Deployment(shape, policy="fair", enable_prefix_caching=False)
    tenants = ["busy"]
    leads = []
    for step in range(900):
        for tenant in tenants:
            num_open = sum(
                each.tenant == tenant for id, each in deployment.requests.items() if id not in deployment.finished
            )
            for _ in range(6 - num_open):
                deployment.add(request(len(deployment.requests), 6, 4, tenant=tenant))
        deployment.step()
        if step == 400:
            before = told(deployment)
            tenants.append("idle")
        if step > 400:
            now = told(deployment)
            leads.append((now["idle"] - before["idle"]) - (now["busy"] - before["busy"]))
    # It is light until it has an eighth of the last 64 steps' worth, which are 16 tokens each; and a few requests.
    assert max(leads) < 64 * 16 / 8 + 4 * (6 + 2 * 4)
    assert abs(leads[-1]) < 64 * 16 / 8 + 4 * (6 + 2 * 4)
