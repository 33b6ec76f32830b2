"""The number of replicas over time, for loads that are written down here."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manta.cluster.launch.arrivals import Arrivals
from manta.cluster.launch.autoscale import Autoscaler, Sample
from manta.configs.schema import ServeConfig
from manta.protos import engine_pb2 as pb


def config(**fields: object) -> ServeConfig:
    defaults = {"model": "m", "max_num_seqs": 10, "min_replicas": 1, "max_replicas": 4, "downscale_delay_s": 30.0}
    return ServeConfig.model_validate(defaults | fields)


def sample(present: int, running: int = 0, waiting: int = 0, at_s: float = 0.0, **fields: float) -> Sample:
    quiet = Sample(at_s, present, present, running, waiting, kv_usage=0.0, waiting_kv=0.0, oldest_wait_s=0.0)
    return replace(quiet, **fields)


def after(scaler: Autoscaler, seconds: float, one: Sample) -> int:
    """What is wanted when the sample has lasted so long."""
    scaler.wanted(one)
    return scaler.wanted(replace(one, at_s=one.at_s + seconds))


@pytest.mark.parametrize(
    ("one", "wanted"),
    [
        (sample(1, running=8), 1),  # 80 % of the slots
        (sample(1, running=9), 2),
        (sample(1, running=10, waiting=14), 3),
        (sample(1, running=10, waiting=500), 4),  # no more than there may be
        (sample(2, running=2, kv_usage=0.9), 3),
        (sample(1, running=2, waiting=2, kv_usage=0.5, waiting_kv=1.5), 3),
        (sample(1, running=1, oldest_wait_s=1.5), 2),  # late, whatever the reason
        (sample(2, running=1, oldest_wait_s=1.5, num_serving=1), 2),  # another one is on the way
        (sample(0, num_serving=0), 1),  # the fewest there may be
    ],
)
def test_up_to_what_is_needed(one: Sample, wanted: int) -> None:
    assert after(Autoscaler(config()), 2.0, one) == wanted


def test_a_moment_is_no_reason_but_from_nothing() -> None:
    scaler = Autoscaler(config(min_replicas=0))
    assert after(scaler, 1.9, sample(1, running=30)) == 1
    assert scaler.wanted(sample(1, running=5, at_s=2.0)) == 1
    assert scaler.wanted(sample(1, running=30, at_s=3.0)) == 1
    assert Autoscaler(config(min_replicas=0)).wanted(sample(0, waiting=1)) == 1
    assert Autoscaler(config(min_replicas=0)).wanted(sample(0)) == 0


def test_down_one_by_one_to_the_fewest() -> None:
    scaler, present, history = Autoscaler(config(min_replicas=0)), 3, []
    for at_s in range(200):
        wanted = scaler.wanted(sample(present, at_s=float(at_s)))
        if wanted != present:
            present = wanted
            history.append((at_s, present))
    assert history == [(30, 2), (61, 1), (92, 0)]


def test_what_the_others_could_not_hold_stays() -> None:
    """Two replicas with 9 requests of 10 slots each run at 45 %; one alone would be at 90."""
    assert after(Autoscaler(config()), 1000.0, sample(2, running=9)) == 2
    assert after(Autoscaler(config()), 1000.0, sample(2, running=4)) == 1


def test_a_burst_sets_the_way_down_back() -> None:
    scaler = Autoscaler(config())
    scaler.wanted(sample(2, at_s=0.0))
    scaler.wanted(sample(2, running=15, at_s=20.0))
    assert scaler.wanted(sample(2, at_s=31.0)) == 2
    assert scaler.wanted(sample(2, at_s=60.0)) == 2
    assert scaler.wanted(sample(2, at_s=61.0)) == 1


@given(
    st.integers(0, 3),
    st.integers(3, 6),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 80), st.integers(0, 80), st.floats(0, 5)), max_size=50),
)
def test_never_outside_the_bounds(lowest: int, highest: int, loads: list[tuple[int, int, int, float]]) -> None:
    scaler = Autoscaler(config(min_replicas=lowest, max_replicas=highest, data_parallel_size=max(lowest, 1)))
    for at_s, (present, running, waiting, late_s) in enumerate(loads):
        one = sample(min(present, highest), running, waiting, at_s=10.0 * at_s, oldest_wait_s=late_s)
        assert lowest <= scaler.wanted(one) <= highest


def test_a_sample_of_the_load() -> None:
    load = pb.LoadResponse(
        num_running=5,
        num_waiting=7,
        num_waiting_tokens=400,
        kv_cache_usage=0.25,
        oldest_wait_s=0.5,
        replicas=[
            pb.ReplicaLoad(num_blocks=50),
            pb.ReplicaLoad(state=pb.ReplicaLoad.LOST),
            pb.ReplicaLoad(state=pb.ReplicaLoad.ABSENT),
            pb.ReplicaLoad(state=pb.ReplicaLoad.GIVEN_UP),
        ],
    )
    assert Sample.of(load, 3.0, block_size=16) == Sample(3.0, 1, 2, 5, 7, 0.25, 0.5, 0.5)
    jobs = {0: "retire", 1: "start", 2: "start"}
    assert Sample.of(load, 3.0, 16, jobs) == Sample(3.0, 0, 2, 5, 7, 0.25, 0.5, 0.5)


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        ({}, (1, 1, 1)),
        ({"data_parallel_size": 3}, (3, 3, 3)),
        ({"max_replicas": 4}, (1, 1, 4)),
        ({"min_replicas": 2, "max_replicas": 4}, (2, 2, 4)),
        ({"min_replicas": 0, "max_replicas": 2}, (0, 1, 2)),
        ({"min_replicas": 0, "data_parallel_size": 2}, (0, 2, 2)),
        ({"min_replicas": 1, "data_parallel_size": 3, "max_replicas": 4}, (1, 3, 4)),
    ],
)
def test_the_numbers_of_replicas(fields: dict[str, int], numbers: tuple[int, int, int]) -> None:
    one = ServeConfig.model_validate({"model": "m"} | fields)
    assert (one.min_num_replicas, one.num_replicas_at_start, one.max_num_replicas) == numbers


@pytest.mark.parametrize(
    "fields",
    [
        {"min_replicas": 3, "max_replicas": 2},
        {"data_parallel_size": 5, "max_replicas": 4},
        {"data_parallel_size": 1, "min_replicas": 2, "max_replicas": 4},
    ],
)
def test_numbers_that_do_not_fit_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"min_replicas=.* must not decrease"):
        ServeConfig.model_validate({"model": "m"} | fields)


def test_a_lull_takes_nothing_away() -> None:
    scaler = Autoscaler(config(upscale_delay_s=0.0, downscale_delay_s=2.0))
    for at_s in range(30):
        scaler.wanted(replace(sample(2, running=12, at_s=float(at_s)), num_arrived=6 * at_s))
    lull = replace(sample(2, running=2), num_arrived=180)
    assert [scaler.wanted(replace(lull, at_s=30.0 + at_s)) for at_s in range(4)] == [2, 2, 2, 2]
    assert 1 in [scaler.wanted(replace(lull, at_s=34.0 + at_s)) for at_s in range(60)]


def test_bursts_get_the_room_that_they_need_on_average() -> None:
    """36 requests every 6 s, each of which runs for 2 s: 12 at a time, though at most looks few or none are there."""
    scaler, num_arrived, history = Autoscaler(config(upscale_delay_s=0.0, downscale_delay_s=3.0)), 0, []
    for at_s in range(60):
        num_arrived += 36 if at_s % 6 == 0 else 0
        running = 36 if at_s % 6 < 2 else 0
        one = replace(sample(2, running=running, at_s=float(at_s)), num_arrived=num_arrived)
        history.append(scaler.wanted(one))
    assert set(history[30:]) <= {2, 4}


def test_a_scheduler_in_the_place_of_another_counts_anew() -> None:
    arrivals = Arrivals()
    for at_s in range(20):
        arrivals.observe(float(at_s), 2**32 - 10 + at_s, 4, 0)
    assert arrivals.per_s == pytest.approx(1.0, rel=0.1)
    assert arrivals.takes_s == pytest.approx(4.0, rel=0.1)
    arrivals.observe(20.0, 3, 4, 0)
    arrivals.observe(21.0, 4, 4, 0)
    assert arrivals.per_s == pytest.approx(1.0, rel=0.1)
