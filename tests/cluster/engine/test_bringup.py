"""Bring-up: what workers are told, what the scheduler is told, and what a person is told when it fails."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from manta.cluster.engine.bringup import BringUpError, bring_up
from manta.cluster.engine.workers import WorkerError
from tests.support.fake_deployment import fake_config, fake_spec, run
from tests.support.fake_worker_server import FakeWorker, FakeWorkerServer


@asynccontextmanager
async def fake_workers(*workers: FakeWorker) -> AsyncIterator[list[str]]:
    servers = [FakeWorkerServer(worker) for worker in workers]
    try:
        yield [await server.start() for server in servers]
    finally:
        for server in servers:
            await server.stop()


def test_ranks_are_numbered_stage_by_stage_and_the_smallest_decides() -> None:
    async def test() -> None:
        workers = [FakeWorker(num_blocks=n) for n in (90, 80, 70, 99)]
        config = fake_config(tensor_parallel_size=2, pipeline_parallel_size=2)
        async with fake_workers(*workers) as addresses:
            deployment = await bring_up(config, fake_spec(), [addresses])
            loads = [worker.load for worker in workers]
            assert [(load.pp_rank, load.tp_rank) for load in loads if load] == [(0, 0), (0, 1), (1, 0), (1, 1)]
            assert [load.num_workers_on_host for load in loads if load] == [4] * 4
            assert {load.rendezvous_port for load in loads if load} == {12345}
            assert [worker.started_blocks for worker in workers] == [70] * 4
            (capacity,) = deployment.capacities
            assert (capacity.num_blocks, capacity.block_size, capacity.num_lanes) == (70, 8, 2)
            assert deployment.groups[0].output_rank == 2
            assert {"describe", "load", "weights", "profile", "start"} == set(deployment.startup_s)
            await deployment.close()

    run(test())


def test_who_has_loaded_hears_of_us_while_others_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that hears nothing for minutes ends."""
    monkeypatch.setattr("manta.cluster.engine.bringup._CALL_EVERY_S", 0.01)
    enough = asyncio.Event()

    class Heard(FakeWorker):
        num_calls = 0

        async def Describe(self, request: Any, context: Any) -> Any:
            self.num_calls += self.load is not None
            if self.num_calls == 3:
                enough.set()
            return await super().Describe(request, context)

    class Slow(FakeWorker):
        async def Load(self, request: Any, context: Any) -> Any:
            await enough.wait()
            return await super().Load(request, context)

    async def test() -> None:
        async with fake_workers(Heard(), Slow()) as (first, second), asyncio.timeout(20):
            deployment = await bring_up(fake_config(data_parallel_size=2), fake_spec(), [[first], [second]])
            await deployment.close()

    run(test())


def test_a_failing_rank_is_one_sentence_and_nobody_waits_for_the_others() -> None:
    class Stuck(FakeWorker):
        async def Load(self, request: Any, context: Any) -> Any:
            await asyncio.Event().wait()

    async def test() -> None:
        broken = FakeWorker()
        broken.load_error = "no tensor 'lm_head.weight'\nTraceback (most recent call last):\n  ..."
        async with fake_workers(Stuck(), broken) as addresses:
            with pytest.raises(WorkerError) as error:
                await bring_up(fake_config(tensor_parallel_size=2), fake_spec(), [addresses])
            assert str(error.value) == f"worker rank 1 at {addresses[1]}: no tensor 'lm_head.weight'"

    run(test())


def test_a_worker_that_dies_while_loading_is_named() -> None:
    class Dying(FakeWorker):
        server: FakeWorkerServer | None = None

        async def Load(self, request: Any, context: Any) -> Any:
            assert self.server is not None
            asyncio.get_running_loop().create_task(self.server.stop())
            await asyncio.Event().wait()

    async def test() -> None:
        worker = Dying()
        worker.server = FakeWorkerServer(worker)
        address = await worker.server.start()
        with pytest.raises(WorkerError, match=r"worker rank 0 at .*: the process does not answer"):
            await bring_up(fake_config(), fake_spec(), [[address]])

    run(test())


def test_the_context_is_lowered_to_what_the_pool_holds(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with fake_workers(FakeWorker(num_blocks=10)) as addresses:
            deployment = await bring_up(fake_config(), fake_spec(max_position=512), [addresses])
            assert deployment.max_model_len == 80
            await deployment.close()

    with caplog.at_level(logging.WARNING):
        run(test())
    assert "max_model_len lowered to 80" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_model_len": 100}, "max_model_len=100 does not fit the 80 tokens .* --max-model-len to 80, .*-bytes"),
        ({"max_model_len": 600}, "max_model_len=600 is more than the 512 positions of the model"),
        ({"tensor_parallel_size": 2}, r"needs 2 workers, got \[1\]"),
    ],
)
def test_what_cannot_work_is_refused_with_the_numbers(fields: dict[str, int], message: str) -> None:
    async def test() -> None:
        async with fake_workers(FakeWorker(num_blocks=10)) as addresses:
            with pytest.raises(BringUpError, match=message):
                await bring_up(fake_config(**fields), fake_spec(max_position=512), [addresses])

    run(test())


def test_num_gpu_blocks_override_decides() -> None:
    async def test() -> None:
        worker = FakeWorker(num_blocks=500)
        async with fake_workers(worker) as addresses:
            deployment = await bring_up(fake_config(num_gpu_blocks_override=12), fake_spec(), [addresses])
            assert worker.started_blocks == deployment.capacities[0].num_blocks == 12
            assert deployment.max_model_len == 96
            await deployment.close()

    run(test())
