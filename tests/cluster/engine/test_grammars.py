"""Requests that follow a grammar wait until workers have compiled it, and nobody else does."""

import asyncio

import pytest

from manta.cluster.engine import grammars
from manta.cluster.engine.client import InvalidRequestError, QueueFullError
from manta.cluster.engine.types import GenerationRequest
from manta.protos import engine_pb2 as pb
from manta.protos.sampling_pb2 import Grammar
from tests.support.fake_deployment import collect, fake_config, fake_deployment, request, run, until
from tests.support.fake_worker_server import BAD_GRAMMAR, fake_tokens


def following(regex: str, prompt: list[int], max_tokens: int, seed: int = 0) -> GenerationRequest:
    return request(prompt, max_tokens, seed, structured_outputs={"regex": regex})


def test_others_go_on_while_a_grammar_is_compiled() -> None:
    async def test() -> None:
        async with fake_deployment(fake_config(tensor_parallel_size=2, pipeline_parallel_size=2)) as deployment:
            workers = deployment.workers[0]
            for worker in workers:
                worker.compiles.clear()
            client = deployment.client
            waiting = [asyncio.create_task(collect(client.generate(following("a+", [4, 5], 3, i)))) for i in range(4)]
            await until(lambda: all(worker.compiled for worker in workers[2:]), "the last stage is asked to compile")
            tokens, last = await collect(client.generate(request([1, 2, 3], 40)))
            assert (tokens, last.finish_reason) == (fake_tokens([1, 2, 3], 40, 0), "length")
            num_steps = workers[3].num_steps
            assert num_steps <= 41, "one step per token, and a surplus one: none for those that wait"
            assert not any(task.done() for task in waiting)
            assert deployment.engine.load().num_waiting == 4, "their replica is needed"
            for worker in workers:
                worker.compiles.set()
            for seed, (tokens, _) in enumerate(await asyncio.gather(*waiting)):
                assert tokens == fake_tokens([4, 5], 3, seed)
            assert [worker.compiled for worker in workers] == [[], [], ["a+"], ["a+"]], "once for all of them"
            await deployment.settled()

    run(test())


def test_a_bad_grammar_is_refused_with_the_workers_reason() -> None:
    async def test() -> None:
        async with fake_deployment() as deployment:
            bad = [collect(deployment.client.generate(following(BAD_GRAMMAR, [4], 3))) for _ in range(3)]
            for error in await asyncio.gather(*bad, return_exceptions=True):
                assert isinstance(error, InvalidRequestError)
                assert str(error) == "a bad grammar"
            await deployment.settled()

    run(test())


def test_requests_that_wait_can_be_aborted() -> None:
    async def test() -> None:
        async with fake_deployment() as deployment:
            (worker,) = deployment.workers[0]
            worker.compiles.clear()
            chunks = deployment.client.generate(following("a+", [4, 5], 3))
            waiting = asyncio.ensure_future(anext(chunks))
            await until(lambda: worker.compiled == ["a+"], "the worker is asked to compile")
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await deployment.settled()
            worker.compiles.set()
            tokens, _ = await collect(deployment.client.generate(following("a+", [4, 5], 3)))
            assert tokens == fake_tokens([4, 5], 3, 0)

    run(test())


def test_too_many_that_wait_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "MAX_WAITING", 2)

    async def test() -> None:
        async with fake_deployment() as deployment:
            (worker,) = deployment.workers[0]
            worker.compiles.clear()
            client = deployment.client
            waiting = [asyncio.create_task(collect(client.generate(following(one, [4], 2)))) for one in ("a", "b")]
            await until(lambda: len(worker.compiled) == 2, "both are compiled")
            with pytest.raises(QueueFullError):
                await collect(client.generate(following("c", [4], 2)))
            worker.compiles.set()
            await asyncio.gather(*waiting)
            await deployment.settled()

    run(test())


def test_a_lost_replica_does_not_keep_others_from_following() -> None:
    async def test() -> None:
        async with fake_deployment(fake_config(data_parallel_size=2)) as deployment:
            await deployment.servers[1][0].stop()
            tokens, _ = await collect(deployment.client.generate(following("a+", [4, 5], 3)))
            assert tokens == fake_tokens([4, 5], 3, 0)

    run(test())


def test_who_comes_while_ranks_meet_again_waits_for_them() -> None:
    async def test() -> None:
        async with fake_deployment() as deployment:
            (worker,) = deployment.workers[0]
            worker.has_runner = False
            waiting = asyncio.create_task(collect(deployment.client.generate(following("a+", [4, 5], 3))))
            await until(lambda: len(worker.compiled) > 1, "the worker is asked again")
            worker.has_runner = True
            assert (await waiting)[0] == fake_tokens([4, 5], 3, 0)

    run(test())


@pytest.mark.parametrize("ends_first", [True, False], ids=["dead", "closed"])
def test_who_waits_for_workers_that_are_replaced_goes_on_with_others(ends_first: bool) -> None:
    async def test() -> None:
        async with fake_deployment(replaces_workers=True) as deployment:
            (worker,), (server,) = deployment.workers[0], deployment.servers[0]
            worker.compiles.clear()
            waiting = asyncio.create_task(collect(deployment.client.generate(following("a+", [4, 5], 3))))
            await until(lambda: worker.compiled == ["a+"], "the worker is asked to compile")
            if ends_first:
                await server.stop()
                await until(lambda: bool(deployment.lost), "the loss is noticed")
                late = asyncio.create_task(collect(deployment.client.generate(following("b+", [6], 3))))
                await until(lambda: deployment.engine.scheduler.num_waiting == 2, "both are queued")
            else:
                late = waiting
            await deployment.add(0)
            async with asyncio.timeout(10):
                assert (await waiting)[0] == fake_tokens([4, 5], 3, 0)
                await late
            worker.compiles.set()
            await server.stop()
            await deployment.settled()

    run(test())


def test_what_was_accepted_before_is_never_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "MAX_WAITING", 1)

    async def test() -> None:
        gate = grammars.GrammarGate([])
        told: list[pb.Refused | None] = []
        assert gate.hold(1, Grammar(text="a"), told.append) is None
        assert gate.hold(2, Grammar(text="b"), told.append, resubmitted=True) is None
        refused = gate.hold(3, Grammar(text="c"), told.append)
        assert refused is not None
        assert refused.code == pb.Refused.QUEUE_FULL
        await until(lambda: told == [None, None], "both are released")

    run(test())
