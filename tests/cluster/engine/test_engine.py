"""The engine behind its gRPC service, with fake workers that refuse wrong differences."""

import asyncio
from functools import partial
from typing import Any

import grpc.aio
import pytest

from manta.cluster.engine.client import EngineClient, EngineLostError, InvalidRequestError, QueueFullError
from manta.cluster.engine.in_process import InProcessClient
from manta.cluster.engine.types import DrainingError
from manta.protos import engine_pb2 as pb
from manta.protos import sampling_pb2, worker_pb2
from tests.support.fake_deployment import collect, fake_config, fake_deployment, fake_spec, request, run, until
from tests.support.fake_worker_server import FakeWorker, Transport, fake_tokens


def prompt_of(index: int, length: int) -> list[int]:
    return [(index * 7 + i * 3) % 1000 for i in range(length)]


async def read_to_the_end(call: Any) -> None:
    """Raises the stream's error; gRPC holds it back until every message before it is read."""
    while await call.read() is not grpc.aio.EOF:
        pass


@pytest.mark.parametrize("transport", ["grpc", "unix", "tcp"])
@pytest.mark.parametrize(
    ("tp", "pp", "dp"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 2)], ids=["1", "tp2", "pp2", "tp2-pp2-dp2"]
)
def test_every_request_gets_its_own_tokens(tp: int, pp: int, dp: int, transport: Transport) -> None:
    async def test() -> None:
        config = fake_config(tensor_parallel_size=tp, pipeline_parallel_size=pp, data_parallel_size=dp)
        worker = partial(FakeWorker, num_blocks=64)
        async with fake_deployment(config, make_worker=worker, transport=transport) as deployment:
            shapes = [(i, 1 + i * 13 % 90, 1 + i * 5 % 40) for i in range(60)]
            requests = [request(prompt_of(i, length), n, seed=i) for i, length, n in shapes]
            results = await asyncio.gather(*(collect(deployment.client.generate(one)) for one in requests))
            for (i, length, n), (tokens, last) in zip(shapes, results, strict=True):
                assert tokens == fake_tokens(prompt_of(i, length), n, seed=i)
                assert last.finish_reason == "length"
            await deployment.settled()
            assert not deployment.lost
            steps = [worker.num_steps for replica in deployment.workers for worker in replica]
            assert all(steps)

    run(test())


def test_hundreds_of_requests_from_several_frontends() -> None:
    async def test() -> None:
        config = fake_config(max_num_seqs=64, max_num_batched_tokens=256)
        async with fake_deployment(config, make_worker=lambda: FakeWorker(num_blocks=300)) as deployment:
            clients = [await EngineClient.connect(deployment.address) for _ in range(3)]
            shapes = [(i, 2 + i % 50, 1 + i % 23) for i in range(300)]

            async def one(i: int, length: int, n: int) -> None:
                tokens, _ = await collect(clients[i % 3].generate(request(prompt_of(i, length), n, seed=i)))
                assert tokens == fake_tokens(prompt_of(i, length), n, seed=i)

            await asyncio.gather(*(one(*shape) for shape in shapes))
            await deployment.settled()
            for client in clients:
                await client.close()

    run(test())


def test_two_plans_are_in_the_worker_at_once() -> None:
    async def test() -> None:
        async with fake_deployment(make_worker=lambda: FakeWorker(step_s=0.01)) as deployment:
            await collect(deployment.client.generate(request([1, 2, 3], 12)))
            assert deployment.workers[0][0].max_queued == 2

    run(test())


def test_a_stop_token_ends_the_request_and_is_delivered() -> None:
    async def test() -> None:
        expected = fake_tokens([5, 6, 7], 20, seed=0)
        async with fake_deployment(spec=fake_spec(eos_token_id=expected[4])) as deployment:
            tokens, last = await collect(deployment.client.generate(request([5, 6, 7], 20)))
            assert (tokens, last.finish_reason, last.stop_token) == (expected[:5], "stop", expected[4])

            tokens, last = await collect(deployment.client.generate(request([5, 6, 7], 20, ignore_eos=True)))
            assert (tokens, last.finish_reason, last.stop_token) == (expected, "length", None)

            mine = request([5, 6, 7], 20, ignore_eos=True, stop_token_ids=[expected[9]])
            tokens, last = await collect(deployment.client.generate(mine))
            assert (tokens, last.stop_token) == (expected[:10], expected[9])
            await deployment.settled()

    run(test())


def test_the_worker_is_told_what_to_mask_before_min_tokens() -> None:
    async def test() -> None:
        seen: list[sampling_pb2.Sampling] = []

        class Worker(FakeWorker):
            async def _step(self, plan: worker_pb2.StepPlan) -> worker_pb2.StepResult:
                seen.extend(add.sampling for add in plan.adds)
                return await super()._step(plan)

        async with fake_deployment(spec=fake_spec(eos_token_id=9), make_worker=Worker) as deployment:
            await collect(
                deployment.client.generate(request([1], 6, min_tokens=4, stop_token_ids=[3], temperature=0.5))
            )
        (sampling,) = seen
        assert list(sampling.stop_token_ids) == [3, 9]
        assert (sampling.min_tokens, sampling.temperature, sampling.top_p) == (4, 0.5, 1.0)

    run(test())


def test_prefix_cache_hits_are_reported() -> None:
    async def test() -> None:
        async with fake_deployment() as deployment:
            prompt = prompt_of(1, 44)
            _, first = await collect(deployment.client.generate(request(prompt, 2)))
            _, second = await collect(deployment.client.generate(request(prompt, 2)))
            assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 40)
            assert second.queue_s > 0

    run(test())


def test_conversations_stay_where_their_blocks_are() -> None:
    async def test() -> None:
        config = fake_config(data_parallel_size=2, max_num_seqs=4)
        async with fake_deployment(config, make_worker=lambda: FakeWorker(step_s=0.002)) as deployment:
            scheduler = deployment.engine.scheduler
            prompts = [prompt_of(1, 404), prompt_of(2, 404)]
            running = [asyncio.create_task(collect(deployment.client.generate(request(each, 40)))) for each in prompts]
            await until(lambda: scheduler.num_running == 2, "both run")
            assert {each.replica for each in scheduler.snapshot().sequences} == {0, 1}
            await asyncio.gather(*running)
            for prompt in [*prompts, *reversed(prompts)]:
                _, last = await collect(deployment.client.generate(request([*prompt, 5], 2)))
                assert last.num_cached_tokens == 400
            deployment.engine.scheduler.check()

    run(test())


def test_leaving_the_iterator_aborts() -> None:
    async def test() -> None:
        async with fake_deployment(make_worker=lambda: FakeWorker(step_s=0.01)) as deployment:
            chunks = deployment.client.generate(request([1, 2], 400))
            await anext(chunks)
            assert deployment.engine.scheduler.num_running == 1
            await chunks.aclose()  # type: ignore[attr-defined]
            await until(lambda: deployment.engine.scheduler.num_running == 0, "the request is aborted")
            await deployment.settled()

    run(test())


def test_a_frontend_that_goes_takes_its_requests_along() -> None:
    async def test() -> None:
        async with fake_deployment(make_worker=lambda: FakeWorker(step_s=0.01)) as deployment:
            other = await EngineClient.connect(deployment.address)
            stays = asyncio.create_task(collect(deployment.client.generate(request([9], 30))))
            leaving = [asyncio.create_task(collect(other.generate(request([i], 400)))) for i in range(5)]
            await until(lambda: deployment.engine.scheduler.num_running == 6, "all run")
            await other.close()
            results = await asyncio.gather(*leaving, return_exceptions=True)
            assert all("client was closed" in str(result) for result in results)
            tokens, _ = await stays
            assert tokens == fake_tokens([9], 30, seed=0)
            await deployment.settled()

    run(test())


def test_refusals_say_why() -> None:
    async def test() -> None:
        config = fake_config(max_num_queued_reqs=2, max_num_seqs=1)
        async with fake_deployment(config, make_worker=lambda: FakeWorker(step_s=0.02)) as deployment:
            generate = deployment.client.generate
            with pytest.raises(InvalidRequestError, match="512"):
                await collect(generate(request(prompt_of(1, 600), 1)))
            with pytest.raises(InvalidRequestError, match="vocabulary"):
                await collect(generate(request([1, 1000], 1)))
            with pytest.raises(InvalidRequestError, match="empty"):
                await collect(generate(request([], 1)))
            with pytest.raises(InvalidRequestError, match="stop_token_ids"):
                await collect(generate(request([1], 1, stop_token_ids=[1000])))

            running = asyncio.create_task(collect(generate(request([1], 50))))
            await until(lambda: deployment.engine.scheduler.num_running == 1, "the first runs")
            waiting = [asyncio.create_task(collect(generate(request([1], 2)))) for _ in range(2)]
            await until(lambda: deployment.engine.scheduler.num_waiting == 2, "two wait")
            with pytest.raises(QueueFullError) as full:
                await collect(generate(request([1], 2)))
            assert full.value.retry_after_s >= 1.0
            await asyncio.gather(running, *waiting)
            await deployment.settled()

    run(test())


def test_drain_finishes_what_runs_and_takes_nothing_new() -> None:
    async def test() -> None:
        async with fake_deployment(make_worker=lambda: FakeWorker(step_s=0.01)) as deployment:
            running = asyncio.create_task(collect(deployment.client.generate(request([4], 40))))
            await until(lambda: deployment.engine.scheduler.num_running == 1, "it runs")
            assert not await deployment.client.drain(timeout_s=0.01)
            with pytest.raises(DrainingError):
                await collect(deployment.client.generate(request([1], 1)))
            assert await deployment.client.drain(timeout_s=20.0)
            tokens, _ = await running
            assert tokens == fake_tokens([4], 40, seed=0)

    run(test())


def test_a_resubmitted_request_goes_on_where_it_was() -> None:
    async def test() -> None:
        async with fake_deployment() as deployment:
            expected = fake_tokens([3, 4], 10, seed=2)
            again = request([3, 4], 10, seed=2)
            again = type(again)("r", again.prompt_token_ids, again.sampling, output_token_ids=expected[:6])
            tokens, last = await collect(deployment.client.generate(again))
            assert (tokens, last.finish_reason) == (expected[6:], "length")
            over = type(again)("r", again.prompt_token_ids, again.sampling, output_token_ids=expected)
            tokens, last = await collect(deployment.client.generate(over))
            assert (tokens, last.finish_reason) == ([], "length")
            await deployment.settled()

    run(test())


def test_info_load_and_block_tables() -> None:
    async def test() -> None:
        config = fake_config(data_parallel_size=2)
        async with fake_deployment(config, make_worker=lambda: FakeWorker(step_s=0.01)) as deployment:
            client = deployment.client
            info = await client.info()
            assert (info.num_blocks, info.block_size, info.max_model_len, info.num_replicas) == (256, 8, 512, 2)
            assert info.device == "cpu"
            assert {"describe", "load", "start"} <= set(info.startup_s)
            running = asyncio.create_task(collect(client.generate(request(prompt_of(1, 20), 60, name="mine"))))
            await until(lambda: deployment.engine.load().num_running == 1, "it runs")
            load = await client.load()
            assert load.healthy
            assert 0 < load.kv_cache_usage < 1
            tables = await client.block_tables()
            (sequence,) = tables.sequences
            assert sequence.request_id == "mine"
            assert len(sequence.blocks) == len(sequence.ref_counts) >= 3
            assert tables.num_blocks - tables.num_free_blocks == len(sequence.blocks)
            await running

    run(test())


def test_a_handle_used_twice_ends_the_stream() -> None:
    async def test() -> None:
        async with fake_deployment(make_worker=lambda: FakeWorker(step_s=0.01)) as deployment:
            call = deployment.client._stub.Connect()
            submit = pb.Submit(handle=1, prompt_tokens=b"\1\0\0\0", max_tokens=400)
            await call.write(pb.FrontendMessage(submit=submit))
            await call.write(pb.FrontendMessage(submit=submit))
            with pytest.raises(grpc.aio.AioRpcError, match="handle 1 is in use"):
                await read_to_the_end(call)
            await until(lambda: deployment.engine.scheduler.num_running == 0, "its requests are aborted")

    run(test())


def test_an_idle_replica_takes_what_another_one_would_preempt() -> None:
    async def test() -> None:
        config = fake_config(data_parallel_size=2, max_num_seqs=2)
        async with fake_deployment(config, make_worker=lambda: FakeWorker(num_blocks=64)) as deployment:
            client = InProcessClient(deployment.engine)  # all are in the queue before anything is planned
            # One replica takes the first two, whose 75 blocks it does not have; the other one is soon without work.
            lengths = (300, 300, 2, 2)
            requests = [request([i], num_tokens, seed=i) for i, num_tokens in enumerate(lengths)]
            results = await asyncio.gather(*(collect(client.generate(one)) for one in requests))
            for i, num_tokens in enumerate(lengths):
                assert results[i][0] == fake_tokens([i], num_tokens, seed=i)
            counters = deployment.engine.scheduler.counters
            assert (counters.num_preemptions, counters.num_moves_copied, counters.num_moves_failed) == (0, 1, 0)
            assert min(replica[0].num_steps for replica in deployment.workers) > 20
            await client.close()

    run(test())


def test_the_client_in_the_engines_own_process_does_the_same() -> None:
    async def test() -> None:
        async with fake_deployment(make_worker=lambda: FakeWorker(step_s=0.005)) as deployment:
            client = InProcessClient(deployment.engine)
            results = await asyncio.gather(*(collect(client.generate(request([i], 9, seed=i))) for i in range(20)))
            assert [tokens for tokens, _ in results] == [fake_tokens([i], 9, seed=i) for i in range(20)]
            with pytest.raises(InvalidRequestError):
                await collect(client.generate(request([], 1)))
            assert (await client.info()).num_blocks == 256
            assert (await client.block_tables()).num_free_blocks == 256
            assert (await client.load()).healthy
            assert b"vllm:" in await client.metrics()
            long = asyncio.create_task(collect(client.generate(request([1], 400))))
            await until(lambda: deployment.engine.scheduler.num_running == 1, "it runs")
            await client.close()
            with pytest.raises(EngineLostError):
                await long
            await deployment.settled()
            assert await deployment.client.drain(1.0)

    run(test())
