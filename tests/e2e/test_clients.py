"""The clients people have, against the real server on Ray: the openai package, and gRPC with nothing but the proto."""

import grpc
import httpx
import openai
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from manta.protos import inference_pb2 as pb
from manta.protos import inference_pb2_grpc
from tests.support.server import ServerProcess

QUESTION = "CREATE TABLE employees (id INTEGER, name TEXT, salary REAL);\nHow many employees are there?"
MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def stub(server: ServerProcess) -> inference_pb2_grpc.InferenceStub:
    return inference_pb2_grpc.InferenceStub(grpc.insecure_channel(server.grpc_address))


def _chat(client: openai.OpenAI, **settings: object) -> object:
    return client.chat.completions.create(model="text2sql", messages=MESSAGES, temperature=0, **settings)  # type: ignore[call-overload]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["text2sql"]
    assert client.models.retrieve("text2sql").id == "text2sql"


def test_chat_streamed_and_not(client: openai.OpenAI) -> None:
    whole = _chat(client)
    choice = whole.choices[0]
    assert "count(*)" in choice.message.content.lower()
    assert "employees" in choice.message.content
    assert choice.finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

    chunks = list(_chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == choice.message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0, "the same prompt came a moment before"


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="text2sql",
        prompt=["SELECT", "CREATE TABLE"],
        max_tokens=7,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 14


def test_seed_decides(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        answer = client.completions.create(
            model="text2sql", prompt="a", max_tokens=24, temperature=1.5, seed=seed, extra_body={"ignore_eos": True}
        )
        return answer.choices[0].text

    assert text(7) == text(7)
    assert len({text(seed) for seed in range(4)}) > 1


def test_stop_string(client: openai.OpenAI) -> None:
    whole = _chat(client).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    cut = _chat(client, stop=stop).choices[0]
    assert cut.message.content == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="text2sql", prompt="a", temperature=-1)
    with pytest.raises(openai.BadRequestError, match="context length"):
        client.completions.create(model="text2sql", prompt="a", max_tokens=100_000)
    with pytest.raises(openai.BadRequestError, match="guided_json"):
        client.completions.create(model="text2sql", prompt="a", extra_body={"guided_json": "{}"})


def test_operations(server: ServerProcess) -> None:
    for path in ("/health", "/ready", "/ping"):
        assert httpx.get(server.url + path).status_code == 200, path
    metrics = httpx.get(server.url + "/metrics").text
    for name in ("vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:time_to_first_token_seconds_bucket",
                 "vllm:prefix_cache_hits_total", "manta:device_idle"):  # fmt: skip
        assert name in metrics, name
    tokens = httpx.post(f"{server.url}/tokenize", json={"model": "text2sql", "prompt": "naïve 🙂"}).json()["tokens"]
    text = httpx.post(f"{server.url}/detokenize", json={"model": "text2sql", "tokens": tokens}).json()["prompt"]
    assert text == "naïve 🙂"


def test_grpc_generate_equals_http(client: openai.OpenAI, stub: inference_pb2_grpc.InferenceStub) -> None:
    sampling = pb.SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    request = pb.GenerateRequest(text="SELECT", sampling=sampling, stream=True)
    responses = list(stub.Generate(request))
    assert len(responses) > 1
    assert responses[-1].finish_reason == "length"
    assert responses[-1].usage.completion_tokens == 20
    assert sum(len(response.token_ids) for response in responses) == 20
    http = client.completions.create(
        model="text2sql", prompt="SELECT", temperature=0, max_tokens=20, extra_body={"ignore_eos": True}
    )
    assert "".join(response.text for response in responses) == http.choices[0].text

    ids = list(stub.Tokenize(pb.TokenizeRequest(text="SELECT")).ids)
    whole = list(stub.Generate(pb.GenerateRequest(tokens=pb.TokenIds(ids=ids), sampling=sampling)))
    assert len(whole) == 1
    assert whole[0].text == http.choices[0].text


def test_grpc_errors_are_status_codes(stub: inference_pb2_grpc.InferenceStub) -> None:
    for request, code in (
        (pb.GenerateRequest(text="a", sampling=pb.SamplingParams(temperature=-1)), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.GenerateRequest(text="a", model="gpt-9"), grpc.StatusCode.NOT_FOUND),
        (pb.GenerateRequest(tokens=pb.TokenIds(ids=[10**6])), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(grpc.RpcError) as error:
            list(stub.Generate(request))
        assert error.value.code() == code
    endless = pb.SamplingParams(max_tokens=1500, ignore_eos=True)
    with pytest.raises(grpc.RpcError) as error:
        list(stub.Generate(pb.GenerateRequest(text="a", sampling=endless), timeout=0.3))
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_grpc_operations(server: ServerProcess, stub: inference_pb2_grpc.InferenceStub) -> None:
    info = stub.GetModelInfo(pb.GetModelInfoRequest())
    assert info.model == "text2sql"
    assert info.num_blocks > 0
    load = stub.GetLoad(pb.GetLoadRequest())
    assert load.num_blocks == info.num_blocks
    assert stub.Detokenize(pb.DetokenizeRequest(ids=stub.Tokenize(pb.TokenizeRequest(text="añb")).ids)).text == "añb"
    assert not stub.Abort(pb.AbortRequest(request_id="nobody")).found
    with grpc.insecure_channel(server.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        reflected = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        service = reflected.FindServiceByName("manta.inference.v1.Inference")
        assert "Generate" in service.methods_by_name
