"""All parts are started anew one after the other; processes and the scheduler are stand-ins."""

from collections.abc import Callable

import pytest

from tests.support.keeper_world import World


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
