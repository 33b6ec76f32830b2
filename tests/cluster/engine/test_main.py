"""The scheduler process as its parent sees it."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from manta.cluster.engine.client import EngineClient
from manta.cluster.engine.main import SchedulerServer, parse_workers
from manta.protos import engine_pb2
from manta.protos import worker_pb2 as pb
from tests.support.fake_deployment import collect, fake_config, request, run
from tests.support.fake_worker_server import VOCAB_SIZE, FakeWorker, FakeWorkerServer, fake_tokens


@pytest.fixture
def config_json(tmp_path: Path) -> str:
    """A model folder without weights: the fake workers need none."""
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    ids = {"vocab_size": VOCAB_SIZE, "eos_token_id": VOCAB_SIZE + 1, "max_position_embeddings": 512}
    config = {"architectures": ["LlamaForCausalLM"], **shape, **ids}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return fake_config(model=str(tmp_path), load_format="dummy").model_dump_json()


@asynccontextmanager
async def scheduler_process(config_json: str, worker: str) -> AsyncIterator[asyncio.subprocess.Process]:
    words = ["--config-json", config_json, "--workers", worker, "--parent-pid", str(os.getpid())]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "manta.cluster.engine.main", *words, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def first_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await process.stdout.readline()).decode().strip()


def test_it_serves_and_ends_on_sigterm(config_json: str) -> None:
    async def test() -> None:
        worker = FakeWorkerServer()
        async with scheduler_process(config_json, await worker.start()) as process:
            word, address = (await first_line(process)).split()
            assert word == "MANTA_ADDRESS"
            client = await EngineClient.connect(address)
            tokens, _ = await collect(client.generate(request([1, 2], 10)))
            assert tokens == fake_tokens([1, 2], 10, seed=0)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
            await client.close()
        await worker.stop()

    run(test())


def test_a_failed_start_is_one_line(config_json: str) -> None:
    async def test() -> None:
        worker = FakeWorkerServer()
        worker.worker.load_error = "no tensor 'x'"
        address = await worker.start()
        async with scheduler_process(config_json, address) as process:
            assert await first_line(process) == f"MANTA_ERROR worker rank 0 at {address}: no tensor 'x'"
            assert await process.wait() == 1
        await worker.stop()

    run(test())


def test_it_ends_when_no_replica_is_left(config_json: str) -> None:
    """The process of the worker lives on: only the scheduler can know. Who starts workers has the last word."""

    class Broken(FakeWorker):
        async def _step(self, plan: pb.StepPlan) -> pb.StepResult:
            return pb.StepResult(epoch=plan.epoch, step=plan.step, error="out of memory")

    async def test() -> None:
        worker = FakeWorkerServer(Broken())
        address = await worker.start()
        async with scheduler_process(config_json, address) as process:
            client = await EngineClient.connect((await first_line(process)).split()[1])
            running = asyncio.create_task(collect(client.generate(request([1, 2], 10))))
            async with asyncio.timeout(20):
                while (load := await client.load()).replicas[0].state != engine_pb2.ReplicaLoad.LOST:
                    await asyncio.sleep(0.01)
            assert not load.healthy
            assert load.detail == f"replica 0: worker rank 0 at {address}: out of memory (3 times in a row)"
            await client._stub.GiveUpReplica(engine_pb2.GiveUpReplicaRequest(reason="enough"))
            _, last = await running
            reason = "no replica is left: enough"
            assert (last.finish_reason, last.error) == ("error", reason)
            assert await first_line(process) == f"MANTA_ERROR {reason}"
            assert await process.wait() == 1
            await client.close()
        await worker.stop()

    run(test())


def test_the_server_class_starts_and_stops(config_json: str) -> None:
    async def test() -> None:
        worker = FakeWorkerServer()
        server = SchedulerServer(config_json, [[await worker.start()]])
        client = await EngineClient.connect(await server.start())
        tokens, _ = await collect(client.generate(request([5], 3)))
        assert tokens == fake_tokens([5], 3, seed=0)
        await client.close()
        await server.stop()
        await server.stop()
        await worker.stop()

    run(test())


def test_worker_addresses_on_the_command_line() -> None:
    assert parse_workers("a:1,b:2;c:3,d:4") == [["a:1", "b:2"], ["c:3", "d:4"]]
