"""gRPC calls that end early, against the real server: nothing of them stays, in the queue or in the cache."""

from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from manta.protos import inference_pb2 as pb
from manta.protos import inference_pb2_grpc as pb_grpc
from tests.support.server import ServerProcess, wait_until

LONG: dict[str, Any] = {"max_tokens": 1900, "ignore_eos": True}  # nearly the demo model's context
USER = {"role": "user", "content": "How many employees are there?"}


@pytest.fixture
def stub(server: ServerProcess) -> Iterator[pb_grpc.InferenceStub]:
    with grpc.insecure_channel(server.grpc_address) as channel:
        yield pb_grpc.InferenceStub(channel)
    wait_until(lambda: is_idle(server), 30, "the pool to be whole")


def is_idle(server: ServerProcess) -> bool:
    tables = httpx.get(f"{server.url}/block_tables").json()
    return tables["num_free_blocks"] == tables["num_blocks"] and not tables["sequences"]


def test_a_cancel_in_mid_stream_frees_blocks(stub: pb_grpc.InferenceStub, server: ServerProcess) -> None:
    sampling = pb.SamplingParams(**LONG, n=4)
    chat = pb.ChatRequest(messages=[USER], sampling=sampling, stream=True, return_token_ids=True)
    generate = pb.GenerateRequest(text="SELECT", sampling=sampling, stream=True)
    for start in (lambda: stub.Chat(chat), lambda: stub.Generate(generate)):
        call = start()
        assert next(call).token_ids
        assert not is_idle(server)
        call.cancel()
        wait_until(lambda: is_idle(server), 30, "the blocks to be free")


def test_a_deadline_ends_what_still_waits(stub: pb_grpc.InferenceStub, server: ServerProcess) -> None:
    running = stub.Generate(pb.GenerateRequest(text="SELECT", sampling={**LONG, "n": 32}))  # as many as run at once
    watch = stub.WatchLoad(pb.WatchLoadRequest(interval_ms=60_000, on_change=True))
    next(load for load in watch if load.num_running == 32)
    waiting = stub.Chat(pb.ChatRequest(messages=[USER], stream=True), timeout=0.5)
    next(load for load in watch if load.num_waiting)
    load = next(load for load in watch if not load.num_waiting)
    assert load.num_running > 1  # those before it still run
    with pytest.raises(grpc.RpcError) as caught:
        list(waiting)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    running.cancel()
    watch.cancel()
