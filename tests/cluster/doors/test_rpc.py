"""The gRPC door through a real channel."""

import asyncio
import time
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from manta.cluster.engine.client import QueueFullError
from manta.protos import inference_pb2 as pb
from manta.protos import inference_pb2_grpc as pb_grpc
from tests.support.door_server import DoorThread
from tests.support.fake_client import FakeClient

REPLY = "The quick brown fox, 你好 🙂🚀"


@pytest.fixture
def channel(doors: DoorThread) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(doors.grpc_address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> pb_grpc.InferenceStub:
    return pb_grpc.InferenceStub(channel)


@pytest.fixture
def scripted(engine: FakeClient, doors: DoorThread) -> list[int]:
    tokens = doors.service.validator.tokenizer.encode(REPLY, add_special_tokens=False)
    engine.model = lambda request: tokens
    return tokens


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_single_response(stub: pb_grpc.InferenceStub, scripted: list[int]) -> None:
    responses = list(stub.Generate(pb.GenerateRequest(text="hello", sampling=pb.SamplingParams(max_tokens=100))))
    assert len(responses) == 1
    assert responses[0].text == REPLY
    assert list(responses[0].token_ids) == [*scripted, 1]
    assert responses[0].finish_reason == "stop"
    assert responses[0].usage.completion_tokens == len(scripted) + 1
    assert responses[0].request_id


@pytest.mark.parametrize("output", ["TEXT_AND_TOKENS", "TEXT", "TOKENS"])
def test_stream(stub: pb_grpc.InferenceStub, scripted: list[int], output: str) -> None:
    request = pb.GenerateRequest(
        request_id="mine", tokens=pb.TokenIds(ids=[300]), stream=True, output=output,
        sampling=pb.SamplingParams(max_tokens=100),
    )  # fmt: skip
    responses = list(stub.Generate(request))
    assert len(responses) > 5
    assert "".join(response.text for response in responses) == ("" if output == "TOKENS" else REPLY)
    tokens = [token for response in responses for token in response.token_ids]
    assert tokens == ([] if output == "TEXT" else [*scripted, 1])
    assert {response.request_id for response in responses} == {"mine"}
    assert [bool(response.finish_reason) for response in responses] == [False] * (len(responses) - 1) + [True]


def test_unset_fields_take_the_defaults_and_zeros_count(stub: pb_grpc.InferenceStub, engine: FakeClient) -> None:
    list(stub.Generate(pb.GenerateRequest(text="x")))
    sampling = engine.submitted[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (1.0, 1.0, 16)
    list(stub.Generate(pb.GenerateRequest(text="x", sampling=pb.SamplingParams(temperature=0, seed=0))))
    sampling = engine.submitted[-1].sampling
    assert (sampling.temperature, sampling.seed) == (0.0, 0)


def test_stop_reasons(stub: pb_grpc.InferenceStub, scripted: list[int]) -> None:
    sampling = pb.SamplingParams(max_tokens=100, stop=["ick bro"])
    (response,) = stub.Generate(pb.GenerateRequest(text="x", sampling=sampling))
    assert (response.text, response.stop_string, response.finish_reason) == ("The qu", "ick bro", "stop")
    sampling = pb.SamplingParams(max_tokens=100, stop_token_ids=[scripted[2]])
    (response,) = stub.Generate(pb.GenerateRequest(text="x", sampling=sampling))
    assert response.WhichOneof("stop_reason") == "stop_token_id"
    assert response.stop_token_id == scripted[2]


@pytest.mark.parametrize(
    ("request_", "code", "param"),
    [
        (pb.GenerateRequest(), "INVALID_ARGUMENT", "prompt"),
        (pb.GenerateRequest(text="x", sampling=pb.SamplingParams(top_p=2)), "INVALID_ARGUMENT", "top_p"),
        (pb.GenerateRequest(text="x", sampling=pb.SamplingParams(max_tokens=999)), "INVALID_ARGUMENT", "max_tokens"),
        (pb.GenerateRequest(tokens=pb.TokenIds(ids=[-1])), "INVALID_ARGUMENT", "prompt"),
        (pb.GenerateRequest(tokens=pb.TokenIds()), "INVALID_ARGUMENT", "prompt"),
        (pb.GenerateRequest(text="x", request_id="a b"), "INVALID_ARGUMENT", "request_id"),
        (pb.GenerateRequest(text="x", model="other"), "NOT_FOUND", "model"),
    ],
)
def test_errors_are_status_codes(
    stub: pb_grpc.InferenceStub, request_: pb.GenerateRequest, code: str, param: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(request_))
    assert caught.value.code().name == code
    assert dict(caught.value.trailing_metadata())["error-param"] == param
    assert caught.value.details()


def test_queue_full(stub: pb_grpc.InferenceStub, engine: FakeClient) -> None:
    engine.refusal = QueueFullError("full", retry_after_s=3)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(pb.GenerateRequest(text="x")))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(caught.value.trailing_metadata())["retry-after"] == "3"


def test_engine_lost_in_mid_stream(stub: pb_grpc.InferenceStub, engine: FakeClient) -> None:
    engine.lost_after = 2
    responses: list[pb.GenerateResponse] = []
    with pytest.raises(grpc.RpcError) as caught:
        responses.extend(stub.Generate(pb.GenerateRequest(tokens=pb.TokenIds(ids=[300]), stream=True)))
    assert len(responses) == 2
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_cancel_and_deadline_abort(stub: pb_grpc.InferenceStub, engine: FakeClient) -> None:
    engine.hang_after = 1
    call = stub.Generate(pb.GenerateRequest(text="x", stream=True))
    next(iter(call))
    call.cancel()
    wait_for(lambda: len(engine.aborted) == 1)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(pb.GenerateRequest(text="x", stream=True), timeout=0.2))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_for(lambda: len(engine.aborted) == 2)


def test_abort_ends_the_stream_and_ids_are_unique(stub: pb_grpc.InferenceStub, engine: FakeClient) -> None:
    engine.hang_after = 2
    request = pb.GenerateRequest(request_id="job", text="x", stream=True)
    call = iter(stub.Generate(request))
    next(call)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(request))
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert stub.Abort(pb.AbortRequest(request_id="job")).found
    assert list(call)[-1].finish_reason == "abort"
    wait_for(lambda: engine.aborted == ["job"])
    assert not stub.Abort(pb.AbortRequest(request_id="job")).found
    engine.hang_after = None
    assert list(stub.Generate(request))[-1].finish_reason == "length"


def test_tokenize_model_info_and_load(stub: pb_grpc.InferenceStub, doors: DoorThread) -> None:
    ids = stub.Tokenize(pb.TokenizeRequest(text=REPLY)).ids
    assert list(ids) == doors.service.validator.tokenizer.hf.encode(REPLY)
    assert stub.Detokenize(pb.DetokenizeRequest(ids=ids)).text == REPLY
    with pytest.raises(grpc.RpcError) as caught:
        stub.Detokenize(pb.DetokenizeRequest(ids=[512]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    info = stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.model, info.max_model_len, info.vocab_size, info.block_size) == ("tiny", 256, 512, 16)
    assert info.architecture == "LlamaForCausalLM"
    assert stub.GetLoad(pb.GetLoadRequest()).num_blocks == 64


def test_health_and_reflection(channel: grpc.Channel, engine: FakeClient) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    serving = health_pb2.HealthCheckResponse.SERVING
    for name in ("", "manta.inference.v1.Inference"):
        assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == serving
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == serving
    engine.healthy = False
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()
    services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert {"manta.inference.v1.Inference", "grpc.health.v1.Health"} <= set(services)


def test_async_clients_at_once(doors: DoorThread) -> None:
    async def ask(stub: pb_grpc.InferenceStub, index: int) -> str:
        sampling = pb.SamplingParams(temperature=0, max_tokens=30)
        tokens = pb.TokenIds(ids=[index + 10])
        call = stub.Generate(pb.GenerateRequest(tokens=tokens, sampling=sampling, stream=index % 2 == 0))
        return "".join([response.text async for response in call])

    async def run() -> None:
        async with grpc.aio.insecure_channel(doors.grpc_address) as channel:
            stub = pb_grpc.InferenceStub(channel)
            together = await asyncio.gather(*(ask(stub, index) for index in range(20)))
            assert list(together) == [await ask(stub, index) for index in range(20)]
            assert len(set(together)) == 20

    asyncio.run(run())
