"""What clients see when workers, frontends or the engine fail."""

import asyncio
import socket

import pytest

from manta.cluster.engine.client import EngineClient, EngineLostError
from manta.cluster.engine.types import DrainingError, UnavailableError
from manta.cluster.links import LinkLostError, connect
from manta.protos import engine_pb2
from manta.protos import worker_pb2 as pb
from tests.support.fake_deployment import collect, fake_config, fake_deployment, request, run, until
from tests.support.fake_worker_server import FakeWorker, Transport, fake_tokens


@pytest.mark.parametrize("transport", ["grpc", "unix"])
def test_a_step_error_replays_with_the_same_tokens(transport: Transport) -> None:
    async def test() -> None:
        async with fake_deployment(transport=transport) as deployment:
            worker = deployment.workers[0][0]
            worker.fail_at_step = 9
            requests = [request([i, i + 1], 30, seed=i) for i in range(8)]
            results = await asyncio.gather(*(collect(deployment.client.generate(one)) for one in requests))
            for i, (tokens, last) in enumerate(results):
                assert tokens == fake_tokens([i, i + 1], 30, seed=i)
                assert last.finish_reason == "length"
            assert worker.fail_at_step is None
            assert worker.device is not None
            assert worker.device.epoch == 2
            await deployment.settled()
            assert b'manta:failovers_total{engine="0",model_name="fake"} 1.0' in deployment.engine.metrics_text()
            assert b'manta:recoveries_total{engine="0",model_name="fake"} 1.0' in deployment.engine.metrics_text()

    run(test())


@pytest.mark.parametrize("rank", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize("sizes", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 3}], ids=["tp", "pp"])
def test_ranks_out_of_step_meet_again(sizes: dict[str, int], rank: int) -> None:
    """What one rank has not computed the others wait for; the next epoch's collectives would meet the old ones."""

    async def test() -> None:
        async with fake_deployment(fake_config(max_num_seqs=4, **sizes)) as deployment:
            deployment.workers[0][rank].fail_at_step = 9
            requests = [request([i, i + 1], 30, seed=i) for i in range(8)]
            results = await asyncio.gather(*(collect(deployment.client.generate(one)) for one in requests))
            for i, (tokens, _) in enumerate(results):
                assert tokens == fake_tokens([i, i + 1], 30, seed=i)
            assert not deployment.lost
            assert [worker.num_meetings for worker in deployment.workers[0]] == [1] * len(deployment.workers[0])
            await deployment.settled()

    run(test())


@pytest.mark.parametrize("sizes", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=["tp", "pp"])
def test_ranks_that_do_not_find_each_other_are_lost(sizes: dict[str, int]) -> None:
    async def test() -> None:
        config = fake_config(data_parallel_size=2, max_num_seqs=4, **sizes)
        async with fake_deployment(config) as deployment:
            worker = deployment.workers[0][1]
            worker.fail_at_step, worker.load_error = 9, "the step under way did not end within 10 s"
            requests = [request([i, i + 1], 30, seed=i) for i in range(8)]
            results = await asyncio.gather(*(collect(deployment.client.generate(one)) for one in requests))
            for i, (tokens, _) in enumerate(results):
                assert tokens == fake_tokens([i, i + 1], 30, seed=i)
            await until(lambda: bool(deployment.lost), "the loss is reported")
            assert deployment.lost[0][0] == 0
            assert "rank 1" in deployment.lost[0][1]
            assert "did not end within 10 s" in deployment.lost[0][1]

    run(test())


def test_a_worker_that_fails_again_and_again_is_given_up() -> None:
    async def test() -> None:
        async with fake_deployment() as deployment:

            async def keep_breaking() -> None:
                while True:
                    deployment.workers[0][0].fail_at_step = 2
                    await asyncio.sleep(0)

            breaking = asyncio.create_task(keep_breaking())
            tokens, last = await collect(deployment.client.generate(request([1], 50)))
            breaking.cancel()
            assert last.finish_reason == "error"
            assert "out of memory (3 times in a row)" in last.error
            assert tokens == fake_tokens([1], 50, seed=0)[: len(tokens)]
            assert "out of memory" in deployment.lost[0][1]
            await deployment.settled()

    run(test())


@pytest.mark.parametrize("transport", ["grpc", "unix"])
def test_a_killed_worker_ends_requests_with_an_error(transport: Transport) -> None:
    async def test() -> None:
        async with fake_deployment(make_worker=lambda: FakeWorker(step_s=0.01), transport=transport) as deployment:
            running = [asyncio.create_task(collect(deployment.client.generate(request([i], 400)))) for i in range(20)]
            scheduler = deployment.engine.scheduler
            await until(lambda: scheduler.num_running + scheduler.num_waiting == 20, "all are taken")
            await deployment.servers[0][0].stop()
            for tokens, last in await asyncio.gather(*running):
                assert last.finish_reason == "error"
                assert "rank 0" in last.error
                assert deployment.servers[0][0].address in last.error
                assert "\n" not in last.error
                assert len(tokens) < 400
            with pytest.raises(UnavailableError, match="no replica"):
                await collect(deployment.client.generate(request([1], 1)))
            load = await deployment.client.load()
            assert not load.healthy
            assert "does not answer" in load.detail
            await deployment.settled()

    run(test())


@pytest.mark.parametrize("transport", ["grpc", "unix"])
def test_another_replica_takes_over(transport: Transport) -> None:
    async def test() -> None:
        config = fake_config(data_parallel_size=2, max_num_seqs=4)
        async with fake_deployment(
            config, make_worker=lambda: FakeWorker(step_s=0.005), transport=transport
        ) as deployment:
            requests = [request([i, 3], 60, seed=i) for i in range(12)]
            running = [asyncio.create_task(collect(deployment.client.generate(one))) for one in requests]
            await until(lambda: deployment.engine.scheduler.num_running == 8, "both replicas are full")
            await deployment.servers[1][0].stop()
            for i, (tokens, last) in enumerate(await asyncio.gather(*running)):
                assert tokens == fake_tokens([i, 3], 60, seed=i)
                assert last.finish_reason == "length"
            await until(lambda: bool(deployment.lost), "the loss is reported")
            assert deployment.lost[0][0] == 1
            assert (await deployment.client.load()).healthy
            await deployment.settled()

    run(test())


@pytest.mark.parametrize("transport", ["grpc", "unix"])
def test_a_stalled_worker_does_not_hang_the_engine(transport: Transport) -> None:
    async def test() -> None:
        async with fake_deployment(transport=transport) as deployment:
            worker = deployment.workers[0][0]
            worker.stalled = True
            tokens, last = await collect(deployment.client.generate(request([1], 5)))
            assert (tokens, last.finish_reason) == ([], "error")
            assert "has not come back within" in last.error
            worker.stalled = False

    run(test())


@pytest.mark.parametrize("transport", ["grpc", "unix"])
@pytest.mark.parametrize("nonsense", [b"\1\0\0\0", b"\1"], ids=["a token too many", "half a token"])
def test_a_wrong_answer_ends_the_epoch(transport: Transport, nonsense: bytes) -> None:
    class Babbler(FakeWorker):
        babble = True

        async def _step(self, plan: pb.StepPlan) -> pb.StepResult:
            result = await super()._step(plan)
            if self.babble and plan.step == 5:
                self.babble = False
                result.tokens += nonsense
            return result

    async def test() -> None:
        async with fake_deployment(make_worker=Babbler, transport=transport) as deployment:
            tokens, _ = await collect(deployment.client.generate(request([1], 20)))
            assert tokens == fake_tokens([1], 20, seed=0)
            device = deployment.workers[0][0].device
            assert device is not None
            assert device.epoch == 2

    run(test())


def test_a_bug_in_the_scheduler_hangs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        config = fake_config(data_parallel_size=2, max_num_seqs=2)
        async with fake_deployment(config, make_worker=lambda: FakeWorker(step_s=0.005)) as deployment:
            running = [asyncio.create_task(collect(deployment.client.generate(request([i], 400)))) for i in range(6)]
            await until(lambda: deployment.engine.scheduler.num_running == 4, "both replicas run")

            def broken(*args: object) -> None:
                raise KeyError("lost")

            monkeypatch.setattr(deployment.engine.scheduler, "apply", broken)
            for _, last in await asyncio.gather(*running):
                assert (last.finish_reason, last.error) == ("error", "internal error: KeyError('lost')")
            with pytest.raises(UnavailableError, match="internal error"):
                await collect(deployment.client.generate(request([1], 1)))
            assert not (await deployment.client.load()).healthy

    run(test())


def test_a_frontend_that_does_not_read_is_cut_off() -> None:
    async def test() -> None:
        async with fake_deployment(max_pending_bytes=24) as deployment:  # two tokens
            reader = await EngineClient.connect(deployment.address)
            results = await asyncio.gather(
                *(collect(deployment.client.generate(request([i], 400))) for i in range(3)), return_exceptions=True
            )
            assert all(isinstance(result, EngineLostError) for result in results)
            assert "unread" in str(results[0])
            tokens, _ = await collect(reader.generate(request([1], 5)))  # others are not concerned
            assert tokens == fake_tokens([1], 5, seed=0)
            await deployment.settled()
            await until(lambda: deployment.client.connected, "the client connects again")
            tokens, _ = await collect(deployment.client.generate(request([1], 5)))
            assert tokens == fake_tokens([1], 5, seed=0)
            await reader.close()

    run(test())


def test_an_engine_that_sends_nonsense_counts_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nonsense:
        def SerializeToString(self) -> bytes:
            return b"\xff\xff\xff"

    async def take() -> Nonsense:
        return Nonsense()

    async def test() -> None:
        async with fake_deployment() as deployment:
            (frontend,) = deployment.engine._publisher._frontends.values()
            monkeypatch.setattr(frontend, "take", take)
            with pytest.raises(EngineLostError, match="what is no message"):
                await collect(deployment.client.generate(request([1], 400)))
            await until(lambda: deployment.client.connected, "the client connects again")
            tokens, _ = await collect(deployment.client.generate(request([1], 5)))
            assert tokens == fake_tokens([1], 5, seed=0)

    run(test())


@pytest.mark.parametrize("message", ["nonsense", "handle in use"])
def test_a_frontend_that_sends_nonsense_ends_alone(message: str) -> None:
    async def test() -> None:
        async with fake_deployment(make_worker=lambda: FakeWorker(step_s=0.01)) as deployment:
            running = asyncio.create_task(collect(deployment.client.generate(request([1], 50))))
            info = await deployment.client.info()
            link = await connect(f"127.0.0.1:{info.link_port}", info.link_socket, info.link_key, timeout_s=20.0)
            submit = engine_pb2.Submit(handle=7, prompt_tokens=b"\1\0\0\0", max_tokens=400)
            first = engine_pb2.FrontendMessage(submit=submit).SerializeToString()
            link.write(first)
            link.write(b"\xff\xff\xff" if message == "nonsense" else first)
            error = ""
            while not error:
                error = engine_pb2.EngineMessage.FromString(await link.read()).error
            assert ("handle 7 is in use" in error) == (message != "nonsense")
            with pytest.raises(LinkLostError):
                await link.read()
            tokens, _ = await running
            assert tokens == fake_tokens([1], 50, seed=0)
            await deployment.settled()

    run(test())


def test_a_client_closed_at_once_leaves_nothing_behind() -> None:
    async def test() -> None:
        async with fake_deployment() as deployment:
            frontends = deployment.engine._publisher._frontends
            client = await EngineClient.connect(deployment.address)
            await until(lambda: len(frontends) == 2, "the engine knows it")
            await client.close()
            await until(lambda: len(frontends) == 1, "the engine has forgotten it")
            client = await EngineClient.connect(deployment.address)
            await client.close()
            await until(lambda: len(frontends) == 1, "the engine has forgotten it")

    run(test())


def test_where_links_reach_nobody_plans_go_over_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that is forwarded to somebody else takes connections, too."""
    monkeypatch.setattr("manta.cluster.streams._CONNECT_TIMEOUT_S", 0.1)

    class Elsewhere(FakeWorker):
        async def Describe(self, request: pb.DescribeRequest, context: object) -> pb.DescribeResponse:
            response = await super().Describe(request, context)
            response.link_port, response.link_socket = silent.getsockname()[1], ""
            return response

    async def test() -> None:
        async with fake_deployment(fake_config(tensor_parallel_size=2), make_worker=Elsewhere) as deployment:
            tokens, _ = await collect(deployment.client.generate(request([1], 20)))
            assert tokens == fake_tokens([1], 20, seed=0)
            assert b'manta:failovers_total{engine="0",model_name="fake"} 0.0' in deployment.engine.metrics_text()

    with socket.create_server(("127.0.0.1", 0)) as silent:
        run(test())


def test_half_a_token_is_refused_and_holds_nothing() -> None:
    async def test() -> None:
        async with fake_deployment() as deployment:
            frontend = deployment.engine.open_frontend()
            deployment.engine.submit(frontend, engine_pb2.Submit(handle=1, prompt_tokens=b"\1\0\0", max_tokens=4))
            message = await frontend.take()
            assert message is not None
            assert [refused.code for refused in message.refused] == [engine_pb2.Refused.INVALID]
            deployment.engine.close_frontend(frontend)
            assert await deployment.client.drain(1.0)

    run(test())


def test_an_engine_that_has_stopped_refuses() -> None:
    async def test() -> None:
        async with fake_deployment() as deployment:
            await deployment.engine.stop()
            with pytest.raises(DrainingError):
                await collect(deployment.client.generate(request([1], 1)))

    run(test())


def test_a_client_without_engine_says_so() -> None:
    async def test() -> None:
        with pytest.raises(EngineLostError, match=r"no engine answers at 127\.0\.0\.1:1"):
            await EngineClient.connect("127.0.0.1:1", timeout_s=0.2)
        async with fake_deployment(make_worker=lambda: FakeWorker(step_s=0.01)) as deployment:
            running = asyncio.create_task(collect(deployment.client.generate(request([1], 400))))
            await until(lambda: deployment.engine.scheduler.num_running == 1, "it runs")
            await deployment.engine.stop()
            _, last = await running
            assert (last.finish_reason, last.error) == ("error", "the engine is shutting down")

    run(test())
