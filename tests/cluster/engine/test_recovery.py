"""New workers for a lost replica, and a new scheduler for workers and frontends that lost theirs: nobody notices more
than a pause."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from manta.cluster.engine import mover
from manta.cluster.engine.bringup import BringUpError
from manta.cluster.engine.client import EngineClient
from manta.cluster.engine.types import Beams, EngineLostError, QueueFullError, UnavailableError
from manta.cluster.engine.workers import WorkerError
from manta.protos import engine_pb2 as pb
from tests.support.fake_deployment import FakeDeployment, collect, fake_config, fake_deployment, request, run, until
from tests.support.fake_worker_server import FakeWorker, Transport, fake_record, fake_tokens


class Slow(FakeWorker):
    def __init__(self) -> None:
        super().__init__(step_s=0.004)


async def under_way(deployment: FakeDeployment, num_running: int) -> None:
    await until(lambda: deployment.engine.scheduler.num_running == num_running, f"{num_running} run")
    worker = deployment.workers[0][0]
    before = worker.num_steps
    await until(lambda: worker.num_steps >= before + 5, "they have tokens")


@pytest.mark.parametrize("transport", ["grpc", "unix"])
def test_a_lone_replica_gets_new_workers(transport: Transport) -> None:
    async def test() -> None:
        async with fake_deployment(make_worker=Slow, transport=transport, replaces_workers=True) as deployment:
            running = [
                asyncio.create_task(collect(deployment.client.generate(request([i], 100, seed=i)))) for i in range(8)
            ]
            await under_way(deployment, 8)
            await deployment.servers[0][0].stop()
            await until(lambda: bool(deployment.lost), "the loss is noticed")
            late = asyncio.create_task(collect(deployment.client.generate(request([50], 5))))
            load = await deployment.client.load()
            assert not load.healthy
            assert [replica.state for replica in load.replicas] == [pb.ReplicaLoad.LOST]
            assert "does not answer" in load.detail
            await deployment.replace(0)
            for i, (tokens, last) in enumerate(await asyncio.gather(*running)):
                assert (tokens, last.finish_reason) == (fake_tokens([i], 100, seed=i), "length")
            assert (await late)[0] == fake_tokens([50], 5, seed=0)
            assert (await deployment.client.load()).healthy
            await deployment.settled()

    run(test())


def test_workers_are_replaced_while_the_replica_still_serves() -> None:
    """Who watches processes may know of a death before the engine does."""

    async def test() -> None:
        config = fake_config(tensor_parallel_size=2, data_parallel_size=2, max_num_seqs=4)
        async with fake_deployment(config, make_worker=Slow, replaces_workers=True) as deployment:
            running = [
                asyncio.create_task(collect(deployment.client.generate(request([i], 60, seed=i)))) for i in range(12)
            ]
            await under_way(deployment, 8)
            deployment.workers[1][0].stalled = True
            await deployment.replace(1)
            for rank, worker in enumerate(deployment.workers[1]):  # each rank may ask another one for the model
                assert worker.load is not None
                assert list(worker.load.peers) == [deployment.servers[0][rank].address]
            assert len((await deployment.client.load()).replicas) == 2
            for i, (tokens, _) in enumerate(await asyncio.gather(*running)):
                assert tokens == fake_tokens([i], 60, seed=i)
            await deployment.settled()

    run(test())


def test_workers_that_cannot_serve_are_refused_and_others_may_come() -> None:
    async def test() -> None:
        async with fake_deployment(make_worker=Slow, replaces_workers=True) as deployment:
            running = asyncio.create_task(collect(deployment.client.generate(request([1], 60))))
            await under_way(deployment, 1)

            class Small(FakeWorker):
                def __init__(self) -> None:
                    super().__init__(num_blocks=100)

            class Broken(FakeWorker):
                def __init__(self) -> None:
                    super().__init__()
                    self.load_error = "no tensor"

            old = type(deployment.workers[0][0])
            for kind, error, message in (
                (Small, BringUpError, "100 KV blocks fit on the new workers of replica 0, which had 256"),
                (Broken, WorkerError, "no tensor"),
            ):
                deployment.workers[0][0].__class__ = kind
                with pytest.raises(error, match=message):
                    await deployment.replace(0)
                assert message in (await deployment.client.load()).detail
            deployment.workers[0][0].__class__ = old
            await deployment.replace(0)
            assert (await running)[0] == fake_tokens([1], 60, seed=0)

    run(test())


def test_what_is_given_up_ends_requests_with_the_reason() -> None:
    async def test() -> None:
        async with fake_deployment(make_worker=Slow, replaces_workers=True) as deployment:
            running = asyncio.create_task(collect(deployment.client.generate(request([1], 400))))
            await under_way(deployment, 1)
            await deployment.servers[0][0].stop()
            await until(lambda: bool(deployment.lost), "the loss is noticed")
            deployment.engine.give_up(0, "it failed 3 times within a minute")
            _, last = await running
            assert (last.finish_reason, last.error) == (
                "error",
                "no replica is left: it failed 3 times within a minute",
            )
            with pytest.raises(UnavailableError, match="3 times within a minute"):
                await collect(deployment.client.generate(request([1], 1)))
            assert await deployment.engine.lost() == "it failed 3 times within a minute"

    run(test())


@pytest.mark.parametrize(
    ("transport", "sizes"),
    [("grpc", {}), ("unix", {}), ("unix", {"tensor_parallel_size": 2})],
    ids=["grpc", "unix", "tp2"],
)
def test_a_new_scheduler_goes_on_with_the_same_workers(transport: Transport, sizes: dict[str, int]) -> None:
    async def test() -> None:
        config = fake_config(max_num_seqs=4, max_num_queued_reqs=8, **sizes)
        async with fake_deployment(config, make_worker=Slow, transport=transport) as deployment:
            client = deployment.client
            requests = [request([i, 7], 80, seed=i, logprobs=1, prompt_logprobs=0) for i in range(12)]
            records = [b""] * 12
            prompts = [b""] * 12

            async def read(i: int) -> list[int]:
                tokens: list[int] = []
                async for chunk in client.generate(requests[i]):
                    tokens += chunk.token_ids
                    records[i] += chunk.logprobs
                    prompts[i] += chunk.prompt_logprobs
                return tokens

            running = [asyncio.create_task(read(i)) for i in range(4)]
            await under_way(deployment, 4)
            running += [asyncio.create_task(read(i)) for i in range(4, 12)]
            await until(lambda: deployment.engine.scheduler.num_waiting == 8, "the queue is full")
            with pytest.raises(QueueFullError):
                await collect(client.generate(request([1], 1)))
            workers = [worker.device for worker in deployment.workers[0]]
            await deployment.kill_engine()
            await until(lambda: not client.connected, "the client has lost it")
            late = asyncio.create_task(collect(client.generate(request([50], 5))))
            await deployment.start_engine_anew()
            assert all(worker.device not in workers for worker in deployment.workers[0])
            for i, tokens in enumerate(await asyncio.gather(*running)):
                assert tokens == fake_tokens([i, 7], 80, seed=i)
                assert records[i] == b"".join(fake_record(token, 2 + at, 1) for at, token in enumerate(tokens))
                assert prompts[i] == fake_record(7, 1, 0)
            assert (await late)[0] == fake_tokens([50], 5, seed=0)
            await deployment.settled()

    run(test())


def test_groups_and_searches_go_on_too() -> None:
    async def test() -> None:
        async with fake_deployment(make_worker=Slow) as deployment:
            samples = deployment.client.generate_group([request([3], 60, seed=seed) for seed in range(3)])
            search = [replace(request([4], 60), beams=Beams(3)) for _ in range(3)]
            alone = deployment.client.generate_group(search)
            expected = [asyncio.create_task(collect(alone.chunks(place))) for place in range(3)]
            before = [tokens for tokens, _ in await asyncio.gather(*expected)]
            beams = deployment.client.generate_group(search)
            running = [asyncio.create_task(collect(samples.chunks(place))) for place in range(3)]
            searching = [asyncio.create_task(collect(beams.chunks(place))) for place in (1, 2)]
            await under_way(deployment, 6)
            await deployment.kill_engine()
            await deployment.start_engine_anew()
            for seed, (tokens, _) in enumerate(await asyncio.gather(*running)):
                assert tokens == fake_tokens([3], 60, seed=seed)
            assert [tokens for tokens, _ in await asyncio.gather(*searching)] == before[1:]
            beams.close()
            await deployment.settled()

    run(test())


def test_a_replica_that_is_gone_is_left_out_by_the_new_scheduler() -> None:
    async def test() -> None:
        config = fake_config(data_parallel_size=2, max_num_seqs=4)
        async with fake_deployment(config, make_worker=Slow) as deployment:
            running = [
                asyncio.create_task(collect(deployment.client.generate(request([i], 60, seed=i)))) for i in range(8)
            ]
            await under_way(deployment, 8)
            await deployment.servers[1][0].stop()
            await deployment.kill_engine()
            await deployment.start_engine_anew()
            states = [replica.state for replica in deployment.engine.load().replicas]
            assert states == [pb.ReplicaLoad.SERVING, pb.ReplicaLoad.LOST]
            for i, (tokens, _) in enumerate(await asyncio.gather(*running)):
                assert tokens == fake_tokens([i], 60, seed=i)
            await deployment.replace(1)
            assert all(replica.state == pb.ReplicaLoad.SERVING for replica in deployment.engine.load().replicas)

    run(test())


def test_a_new_scheduler_does_not_wait_for_a_replica_that_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manta.cluster.engine.revival._OTHERS_TIMEOUT_S", 0.2)

    class Loads(Slow):
        async def Load(self, request: Any, context: Any) -> Any:
            if self.load is not None:
                await asyncio.Event().wait()
            return await super().Load(request, context)

    async def test() -> None:
        async with fake_deployment(fake_config(data_parallel_size=2), make_worker=Loads) as deployment:
            deployment.workers[0][0].load = None
            await deployment.kill_engine()
            await deployment.start_engine_anew()
            load = deployment.engine.load()
            assert [each.state for each in load.replicas] == [pb.ReplicaLoad.SERVING, pb.ReplicaLoad.LOST]
            assert load.replicas[1].detail.endswith("still loads the model")
            tokens, _ = await collect(deployment.client.generate(request([1], 5)))
            assert tokens == fake_tokens([1], 5, seed=0)

    run(test())


@pytest.mark.parametrize(
    "sizes", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=["ranks apart", "stages"]
)
def test_ranks_that_may_be_out_of_step_meet_again(sizes: dict[str, int]) -> None:
    """Under a new scheduler, with the weights they have."""

    async def test() -> None:
        async with fake_deployment(fake_config(**sizes), make_worker=Slow) as deployment:
            running = asyncio.create_task(collect(deployment.client.generate(request([1], 60))))
            await under_way(deployment, 1)
            await deployment.kill_engine()
            device = deployment.workers[0][0].device
            assert device is not None
            device.step += 5 * ("tensor_parallel_size" in sizes)
            await deployment.start_engine_anew()
            assert (await running)[0] == fake_tokens([1], 60, seed=0)
            assert [worker.num_meetings for worker in deployment.workers[0]] == [1, 1]
            await deployment.settled()

    run(test())


def test_ranks_that_have_not_met_anew_are_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst of another scheduler's steps they would add up what does not belong together."""

    async def test() -> None:
        async with fake_deployment(fake_config(tensor_parallel_size=2), make_worker=Slow) as deployment:
            running = asyncio.create_task(collect(deployment.client.generate(request([1], 60))))
            await under_way(deployment, 1)
            await deployment.kill_engine()
            monkeypatch.setattr("manta.cluster.engine.bringup.secrets.token_hex", lambda _: "")
            for _ in range(2):  # not the second time either: nothing has changed
                with pytest.raises(WorkerError, match="in the midst of another scheduler's steps"):
                    await deployment.start_engine_anew()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    run(test())


def test_replicas_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """From one to two, to none, and back: nothing that was asked for is lost."""
    monkeypatch.setattr(mover, "EVACUATION_S", 0.05)  # the others are full

    async def test() -> None:
        config = fake_config(min_replicas=0, max_replicas=2, max_num_seqs=4)
        async with fake_deployment(config, make_worker=Slow, replaces_workers=True) as deployment:
            engine, client = deployment.engine, deployment.client
            states = [replica.state for replica in engine.load().replicas]
            assert states == [pb.ReplicaLoad.SERVING, pb.ReplicaLoad.ABSENT]
            running = [asyncio.create_task(collect(client.generate(request([i], 60, seed=i)))) for i in range(8)]
            await under_way(deployment, 4)
            assert engine.load().oldest_wait_s > 0
            deployment.servers.append([])
            deployment.workers.append([])
            await deployment.add(1)
            await until(lambda: engine.scheduler.num_running == 8, "both replicas are full")
            assert [replica.num_running for replica in engine.load().replicas] == [4, 4]
            await engine.retire(0)
            await engine.retire(1)
            assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (0, 8)
            assert engine.load().healthy
            engine.give_up(0, "no GPU")
            assert engine.load().healthy, "another one can come"
            assert engine.load().detail == "replica 0: no GPU"
            late = asyncio.create_task(collect(client.generate(request([50], 5))))
            await until(lambda: engine.scheduler.num_waiting == 9, "it waits")
            await deployment.add(0)
            for i, (tokens, _) in enumerate(await asyncio.gather(*running)):
                assert tokens == fake_tokens([i], 60, seed=i)
            assert (await late)[0] == fake_tokens([50], 5, seed=0)

    run(test())


def test_a_client_does_not_wait_for_ever() -> None:
    async def test() -> None:
        async with fake_deployment(make_worker=Slow) as deployment:
            client = await EngineClient.connect(deployment.address, patience_s=0.3)
            running = asyncio.create_task(collect(client.generate(request([1], 400))))
            await under_way(deployment, 1)
            await deployment.kill_engine()
            with pytest.raises(EngineLostError, match="lost the engine"):
                await running
            with pytest.raises(EngineLostError, match="not connected"):
                await collect(client.generate(request([1], 1)))
            await deployment.start_engine_anew()
            await until(lambda: client.connected, "it is back")
            assert (await collect(client.generate(request([1], 5))))[0] == fake_tokens([1], 5, seed=0)
            await client.close()

    run(test())


def test_a_replica_that_makes_no_progress_is_not_healthy() -> None:
    """Until a step comes back; a long step is no reason."""

    async def test() -> None:
        async with fake_deployment(replaces_workers=True) as deployment:
            worker, engine = deployment.workers[0][0], deployment.engine
            worker.stalled = True
            running = asyncio.create_task(collect(deployment.client.generate(request([1], 50))))
            await until(lambda: worker._num_queued > 0, "a step is under way")
            assert engine.load().healthy
            await until(lambda: not engine.load().healthy, "its deadline is over")
            assert "has not come back within" in engine.load().detail
            worker.stalled = False
            if engine.load().replicas[0].state == pb.ReplicaLoad.LOST:
                await deployment.replace(0)
            assert (await running)[0] == fake_tokens([1], 50, seed=0)
            assert engine.load().healthy

    run(test())
