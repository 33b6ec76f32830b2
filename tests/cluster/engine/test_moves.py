"""Sequences move between replicas with their blocks: streams go on as if nothing had happened, also when an end of the
copy dies in its midst."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from manta.cluster.engine import mover
from manta.cluster.engine.move_meter import MoveMeter
from manta.scheduler.move_cost import MoveFigures
from manta.scheduler.types import Counters
from tests.support.fake_deployment import FakeDeployment, collect, fake_config, fake_deployment, request, run, until
from tests.support.fake_worker_server import FakeWorker, fake_tokens

NUM_TOKENS = 150


class Slow(FakeWorker):
    def __init__(self) -> None:
        super().__init__(step_s=0.003)


def counters(deployment: FakeDeployment) -> Counters:
    return deployment.engine.scheduler.counters


def resident(deployment: FakeDeployment, replica: int) -> int:
    return deployment.engine.scheduler.num_resident(replica)


def copy_always(deployment: FakeDeployment) -> None:
    """However short they are."""
    deployment.engine._mover.meter.figures = lambda: MoveFigures(64, 1e9, 0.0, 1.0)


@asynccontextmanager
async def running(num_requests: int, **sizes: int) -> AsyncIterator[tuple[FakeDeployment, list[asyncio.Task[Any]]]]:
    """Two replicas; the requests run, most likely on both. In the end all have their tokens."""
    config = fake_config(**({"data_parallel_size": 2, "max_num_seqs": 8} | sizes))
    async with fake_deployment(config, make_worker=Slow, replaces_workers=True) as deployment:
        copy_always(deployment)
        asked = [request([i, 3, 5, 7], NUM_TOKENS, seed=i) for i in range(num_requests)]
        tasks = [asyncio.create_task(collect(deployment.client.generate(one))) for one in asked]
        scheduler = deployment.engine.scheduler
        await until(lambda: scheduler.num_running == num_requests, "all run")
        steps = [replica[0].num_steps for replica in deployment.workers]
        await until(
            lambda: any(r[0].num_steps > n + 5 for r, n in zip(deployment.workers, steps, strict=True)), "steps"
        )
        yield deployment, tasks
        for i, (tokens, last) in enumerate(await asyncio.gather(*tasks)):
            assert (tokens, last.finish_reason) == (fake_tokens([i, 3, 5, 7], NUM_TOKENS, seed=i), "length")
        deployment.engine.scheduler.check()


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_what_a_retired_replica_has_moves_with_its_blocks(tp: int, pp: int) -> None:
    async def test() -> None:
        async with running(6, tensor_parallel_size=tp, pipeline_parallel_size=pp) as (deployment, _):
            leaving = max(range(2), key=lambda replica: resident(deployment, replica))
            num_there = resident(deployment, leaving)
            assert num_there
            await deployment.engine.retire(leaving)
            assert counters(deployment).num_moves_copied == num_there
            assert counters(deployment).num_moves_failed == 0
            assert resident(deployment, 1 - leaving) == deployment.engine.scheduler.num_running
            assert all(worker.num_imports for worker in deployment.workers[1 - leaving])

    run(test())


@pytest.mark.parametrize("dies", ["source", "target"])
def test_an_end_that_dies_in_the_midst_costs_only_a_pause(dies: str) -> None:
    async def test() -> None:
        async with running(6) as (deployment, _):
            leaving = max(range(2), key=lambda replica: resident(deployment, replica))
            target = deployment.workers[1 - leaving][0]
            target.imports.clear()
            retiring = asyncio.create_task(deployment.engine.retire(leaving))
            await until(lambda: target.num_imports > 0, "blocks are on their way")
            lost = leaving if dies == "source" else 1 - leaving
            await deployment.servers[lost][0].stop()
            failovers = deployment.engine._metrics[lost].failovers
            await until(lambda: failovers.value > 0, "the loss is noticed")
            target.imports.set()
            await retiring
            if dies == "target":
                await deployment.replace(1 - leaving)

    run(test())


def test_who_is_aborted_in_the_midst_gives_its_blocks_back() -> None:
    async def test() -> None:
        async with fake_deployment(fake_config(data_parallel_size=2), make_worker=Slow) as deployment:
            copy_always(deployment)
            scheduler = deployment.engine.scheduler
            doomed = asyncio.create_task(collect(deployment.client.generate(request([9] * 20, 400))))
            await until(lambda: any(worker.num_steps > 5 for (worker,) in deployment.workers), "it runs")
            leaving = 0 if resident(deployment, 0) else 1
            target = deployment.workers[1 - leaving][0]
            target.imports.clear()
            retiring = asyncio.create_task(deployment.engine.retire(leaving))
            await until(lambda: target.num_imports > 0, "blocks are on their way")
            doomed.cancel()
            await until(lambda: scheduler.num_running == 0, "it is aborted")
            assert scheduler.num_free_blocks(1 - leaving) < 256
            target.imports.set()
            await retiring
            assert scheduler.num_free_blocks(1 - leaving) == 256

    run(test())


def test_without_room_elsewhere_streams_run_on_until_there_is_some() -> None:
    async def test() -> None:
        async with running(8, max_num_seqs=4) as (deployment, _):
            before = deployment.workers[0][0].num_steps
            retiring = asyncio.create_task(deployment.engine.retire(0))
            await until(lambda: deployment.workers[0][0].num_steps > before + 10, "it runs on")
            assert not retiring.done()
            await retiring
            assert counters(deployment).num_moves_failed == 0

    run(test())


def test_what_cannot_move_in_time_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover, "EVACUATION_S", 0.05)

    async def test() -> None:
        async with running(8, max_num_seqs=4) as (deployment, _):
            await deployment.engine.retire(0)
            assert resident(deployment, 0) == 0
            assert deployment.engine.scheduler.num_waiting > 0

    run(test())


def test_what_costs_is_measured() -> None:
    meter = MoveMeter(block_bytes=1000)
    for _ in range(60):
        meter.observe_copy(10_000_000, 0.104)
        meter.observe_step(100, 2, 0.05)
        meter.observe_step(1, 60, 0.05)  # not worth a look: it is of decodes
    figures = meter.figures()
    assert figures.copy_bytes_per_s == pytest.approx(1e8, rel=0.02)
    assert figures.prefill_tokens_per_s == pytest.approx(2000, rel=0.02)
    assert figures.block_bytes == 1000
