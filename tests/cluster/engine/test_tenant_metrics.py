"""Series by tenant: few of them, and none that ever falls."""

from collections import Counter

import numpy as np
import pytest

from manta.cluster.engine.tenant_metrics import NAMELESS, OTHERS, TenantMetrics


def counted(tenants: TenantMetrics) -> dict[str, float]:
    """By label, tokens generated."""
    family = next(each for each in tenants.collect("m") if each.name == "manta:tenant_generation_tokens")
    return {sample.labels["tenant"]: sample.value for sample in family.samples}


def serve(tenants: TenantMetrics, tenant: str, num_tokens: int) -> None:
    number = tenants.number(tenant)
    tenants.note_arrival(number)
    tenants.note_start(number, 1, 0.1)
    tenants.note_tokens(np.full(num_tokens, number, np.int64))
    tenants.note_end(number, has_started=True)


def test_the_busiest_have_names_and_all_others_one() -> None:
    tenants = TenantMetrics(max_named=3)
    for name in ("a", "b", "", "d", "e"):
        serve(tenants, name, 10)
    assert counted(tenants) == {"a": 10, "b": 10, NAMELESS: 10, OTHERS: 20}
    serve(tenants, "d", 100)
    assert counted(tenants)[OTHERS] == 120  # it was counted there
    serve(tenants, "d", 7)
    now = counted(tenants)
    assert now["d"] == 7
    assert len(now) == 4
    assert now[OTHERS] == 120


@pytest.mark.parametrize("seed", range(5))
def test_no_counter_falls_but_for_a_name_that_went(seed: int) -> None:
    """And while all names have room nothing is lost."""
    rng = np.random.default_rng(seed)
    few, many = TenantMetrics(max_named=4), TenantMetrics(max_named=100)
    served: Counter[str] = Counter()
    before: dict[str, float] = {}
    for _ in range(60):
        for _ in range(int(rng.integers(6))):
            name, num_tokens = f"t{int(rng.zipf(1.4)) % 40}", int(rng.integers(1, 50))
            serve(few, name, num_tokens)
            serve(many, name, num_tokens)
            served[name] += num_tokens
        now = counted(few)
        assert len(now) <= 4 + 1
        assert sum(now.values()) <= served.total()
        for label in before.keys() & now.keys():
            assert now[label] >= before[label] or now[label] == 0, "a counter fell"
        assert now.get(OTHERS, 0) >= before.get(OTHERS, 0)
        before = now
    assert before[OTHERS] > 0
    assert counted(many) == served


def test_who_ends_before_the_start_waited() -> None:
    tenants = TenantMetrics()
    number = tenants.number("a")
    tenants.note_arrival(number)
    tenants.note_arrival(number)
    tenants.note_start(number, 5, 0.0)
    tenants.note_end(number, has_started=False)
    gauges = {family.name: family.samples[0].value for family in list(tenants.collect("m"))[:2]}
    assert gauges == {"manta:tenant_requests_waiting": 0, "manta:tenant_requests_running": 1}
