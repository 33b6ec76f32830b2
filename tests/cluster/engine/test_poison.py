"""A request that makes steps fail costs its neighbours a pause and nothing else."""

import asyncio
from typing import Any

import numpy as np
import pytest

from manta.protos import engine_pb2
from manta.protos import worker_pb2 as pb
from tests.support.fake_deployment import FakeDeployment, collect, fake_config, fake_deployment, request, run, until
from tests.support.fake_worker_server import FakeWorker, fake_tokens

POISON = 666


class Poisoned(FakeWorker):
    """Steps into which a prompt comes that begins with POISON fail."""

    async def _step(self, plan: pb.StepPlan) -> pb.StepResult:
        if any(np.frombuffer(add.tokens, "<i4")[0] == POISON for add in plan.adds):
            return pb.StepResult(epoch=plan.epoch, step=plan.step, error="IndexError: an index is out of bounds")
        return await super()._step(plan)


def prompts(place: int) -> list[list[int]]:
    return [[POISON if i == place else 5, i] for i in range(6)]


async def check(deployment: FakeDeployment, running: list[Any], place: int) -> None:
    for i, (tokens, last) in enumerate(await asyncio.gather(*running)):
        if i == place:
            assert (tokens, last.finish_reason) == ([], "error")
            assert last.error.startswith("the workers fail whenever they run this request: IndexError: an index")
        else:
            assert tokens == fake_tokens(prompts(place)[i], 30, seed=i)
            assert last.finish_reason == "length"
    await deployment.settled()


@pytest.mark.parametrize("place", [1, 5])
def test_it_ends_with_an_error_and_the_workers_stay(place: int) -> None:
    async def test() -> None:
        async with fake_deployment(fake_config(), make_worker=Poisoned) as deployment:
            requests = [request(prompt, 30, seed=i) for i, prompt in enumerate(prompts(place))]
            await check(
                deployment, [asyncio.create_task(collect(deployment.client.generate(r))) for r in requests], place
            )
            assert not deployment.lost
            tokens, _ = await collect(deployment.client.generate(request([1], 5)))
            assert tokens == fake_tokens([1], 5, seed=0)

    run(test())


def test_where_it_comes_first_new_workers_show_that_it_is_to_blame() -> None:
    async def test() -> None:
        async with fake_deployment(fake_config(), make_worker=Poisoned, replaces_workers=True) as deployment:
            running = [
                asyncio.create_task(collect(deployment.client.generate(request(prompt, 30, seed=i))))
                for i, prompt in enumerate(prompts(0))
            ]
            await until(lambda: bool(deployment.lost), "the workers are lost")
            load = deployment.engine.load().replicas[0]
            assert load.state == engine_pb2.ReplicaLoad.LOST
            assert load.num_excused == 2  # of three failures; the limit of restarts counts the first
            await deployment.replace(0)
            await check(deployment, running, 0)

    run(test())


def test_a_new_scheduler_finds_it_again() -> None:
    async def test() -> None:
        async with fake_deployment(fake_config(), make_worker=Poisoned, replaces_workers=True) as deployment:
            running = [
                asyncio.create_task(collect(deployment.client.generate(request(prompt, 30, seed=i))))
                for i, prompt in enumerate(prompts(2))
            ]
            await until(lambda: deployment.engine.scheduler.num_excused(0) == 1, "it is a suspect")
            await deployment.kill_engine()
            await deployment.start_engine_anew()
            await check(deployment, running, 2)

    run(test())
