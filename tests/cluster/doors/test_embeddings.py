"""Embeddings and scores through both doors, over a fake engine."""

import base64
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import httpx
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manta.cluster.doors.limits import ModelLimits
from manta.cluster.doors.pooling import num_in_engine
from manta.cluster.doors.validate import Validator
from manta.cluster.engine.client import QueueFullError
from manta.cluster.engine.types import UNSAMPLED, GenerationRequest
from manta.configs.pooling import Pooling
from manta.configs.schema import ServeConfig
from manta.protos import inference_pb2 as pb
from manta.protos import inference_pb2_grpc as pb_grpc
from tests.support.door_server import MAX_MODEL_LEN, DoorThread
from tests.support.fake_client import FakeClient, fake_vector

HIDDEN_SIZE = 32
TEXTS = ["Hello world", "The quick brown fox", "a"]


def expected(doors: DoorThread, prompt: str | list[int], **fields: Any) -> list[float]:
    tokenizer = doors.service.validator.tokenizer
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    pooling = Pooling.model_validate({"kind": "last", "normalize": True, "dimensions": HIDDEN_SIZE} | fields)
    vector: list[float] = fake_vector(GenerationRequest("", ids, UNSAMPLED, pooling=pooling)).tolist()
    return vector


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_the_openai_client_gets_every_form_of_input(doors: DoorThread, encoding: Any) -> None:
    asked = {} if encoding is None else {"encoding_format": encoding}
    with openai.OpenAI(base_url=f"{doors.base_url}/v1", api_key="none", max_retries=0) as sdk:
        for given_input, prompts in (
            ("Hello world", ["Hello world"]),
            (TEXTS, TEXTS),
            ([5, 6, 7], [[5, 6, 7]]),
            ([[5, 6], [7]], [[5, 6], [7]]),
        ):
            answer = sdk.embeddings.create(model="tiny", input=given_input, user="u", **asked)
            assert (answer.object, answer.model) == ("list", "tiny")
            assert [one.index for one in answer.data] == list(range(len(prompts)))
            for one, prompt in zip(answer.data, prompts, strict=True):
                vector: Any = one.embedding
                if isinstance(vector, str):
                    vector = np.frombuffer(base64.b64decode(vector), "<f4")
                assert np.allclose(vector, expected(doors, prompt), atol=1e-7)
            tokenizer = doors.service.validator.tokenizer
            num_tokens = sum(len(tokenizer.encode(each) if isinstance(each, str) else each) for each in prompts)
            assert answer.usage.prompt_tokens == answer.usage.total_tokens == num_tokens
        short = sdk.embeddings.create(model="tiny", input="Hello world", dimensions=3, extra_body={"normalize": False})
    assert np.allclose(short.data[0].embedding, expected(doors, "Hello world", dimensions=3, normalize=False))


def test_messages_go_through_the_chat_template(http: httpx.Client, engine: FakeClient, doors: DoorThread) -> None:
    messages = [{"role": "user", "content": "hi"}]
    tokenizer = doors.service.validator.tokenizer
    for extra, text in (({}, "<|user|>hi\n"), ({"add_generation_prompt": True}, "<|user|>hi\n<|assistant|>")):
        assert http.post("/v1/embeddings", json={"messages": messages} | extra).status_code == 200
        assert engine.submitted[-1].prompt_token_ids == tokenizer.encode(text, add_special_tokens=False)


def test_what_is_cut_off_is_the_end(http: httpx.Client, engine: FakeClient, doors: DoorThread) -> None:
    whole = doors.service.validator.tokenizer.encode(TEXTS[1])
    for given_input, keep, kept in (
        (TEXTS[1], 3, whole[:3]),
        ([7] * 500, -1, [7] * MAX_MODEL_LEN),
        ([[7, 8, 9]], 2, [7, 8]),
    ):
        answer = http.post("/v1/embeddings", json={"input": given_input, "truncate_prompt_tokens": keep})
        assert answer.json()["usage"]["prompt_tokens"] == len(kept)
        assert engine.submitted[-1].prompt_token_ids == kept


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", "required"),
        ({"input": ""}, "input", "must not be empty"),
        ({"input": []}, "input", "must not be empty"),
        ({"input": ["a", ""]}, "input[1]", "must not be empty"),
        ({"input": {"text": "a"}}, "input", "must be a string, a list of strings"),
        ({"input": ["a", [1]]}, "input", "must be a string, a list of strings"),
        ({"input": [[5], [512]]}, "input[1]", "outside the vocabulary"),
        ({"input": [5] * 257}, "input", "maximum context length is 256 tokens"),
        ({"input": ["a"] * 2049}, "input", "2049 prompts; at most 2048"),
        ({"input": "a", "dimensions": 33}, "dimensions", "between 1 and 32"),
        ({"input": "a", "dimensions": True}, "dimensions", "must be an integer"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", '"float" or "base64"'),
        ({"input": "a", "truncate_prompt_tokens": 257}, "truncate_prompt_tokens", "1 to 256"),
        ({"input": "a", "dimension": 3}, "dimension", "did you mean 'dimensions'"),
        ({"input": "a", "model": "other"}, "model", "does not exist"),
        ({"input": "a", "messages": []}, "messages", "either input or messages"),
        ({"input": "a", "add_generation_prompt": True}, "add_generation_prompt", "belongs to messages"),
        ({"messages": []}, "messages", "at least one message"),
        ({"input": "a", "stream": True}, "stream", "unknown field"),
    ],
)
def test_refusals_name_the_field(http: httpx.Client, body: dict[str, Any], param: str, words: str) -> None:
    answer = http.post("/v1/embeddings", json=body)
    assert answer.status_code == (404 if param == "model" else 400)
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 600) | st.floats(-1e9, 1e9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
_FIELDS = (
    "input", "messages", "dimensions", "normalize", "encoding_format", "truncate_prompt_tokens", "add_special_tokens",
    "priority", "cache_salt", "model", "user", "request_id", "text_1", "text_2",
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=4), st.sampled_from(["/v1/embeddings", "/v1/score"]))
def test_any_body_is_answered_or_refused(http: httpx.Client, body: dict[str, Any], path: str) -> None:
    texts = {"input": "a"} if path == "/v1/embeddings" else {"text_1": "a", "text_2": "b"}
    answer = http.post(path, json=({} if "messages" in body else texts) | body)
    assert answer.status_code in (200, 400, 404)
    if answer.status_code == 200:
        assert answer.json()["data"]
    else:
        assert answer.json()["error"]["param"]


def test_scores_are_cosines(http: httpx.Client, doors: DoorThread) -> None:
    vectors = [np.array(expected(doors, text)) for text in TEXTS]
    answer = http.post("/v1/score", json={"text_1": TEXTS[0], "text_2": TEXTS}).json()
    assert [one["score"] for one in answer["data"]] == pytest.approx([vectors[0] @ v for v in vectors], abs=1e-6)
    answer = http.post("/score", json={"text_1": TEXTS[:2], "text_2": TEXTS[1:]}).json()
    assert [one["score"] for one in answer["data"]] == pytest.approx(
        [vectors[0] @ vectors[1], vectors[1] @ vectors[2]], abs=1e-6
    )
    for body, param in (
        ({"text_1": "a"}, "text_2"),
        ({"text_1": ["a", "b"], "text_2": "c"}, "text_1"),
        ({"text_1": "a", "text_2": [[5]]}, "text_2"),
        ({"text_1": "a", "text_2": ["b", ""]}, "text_2[1]"),
    ):
        answer = http.post("/score", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_client_that_leaves_takes_its_inputs_along(http: httpx.Client, engine: FakeClient) -> None:
    engine.hang_after = 0
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/embeddings", json={"input": TEXTS}, timeout=0.3)
    wait_for(lambda: len(engine.aborted) == len(engine.submitted) == 3)


def test_a_large_call_leaves_room_in_the_queue(http: httpx.Client, engine: FakeClient) -> None:
    engine.hang_after = 0
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/embeddings", json={"input": ["a"] * 1000}, timeout=0.5)
    wait_for(lambda: len(engine.aborted) == len(engine.submitted) == 256)


@pytest.mark.parametrize(
    ("fields", "num_at_once"),
    [({}, 256), ({"max_num_queued_reqs": 9}, 9), ({"max_num_queued_tokens": 35}, 3), ({"max_num_queued_tokens": 1}, 1)],
)
def test_a_call_needs_no_more_than_an_empty_queue_holds(fields: dict[str, int], num_at_once: int) -> None:
    config = ServeConfig.model_validate({"model": "m"} | fields)
    requests = [GenerationRequest("", [5] * length, UNSAMPLED) for length in (1, 10)]
    assert num_in_engine(config, requests) == num_at_once


def test_a_refusal_of_the_engine_is_the_calls(http: httpx.Client, engine: FakeClient) -> None:
    engine.refusal = QueueFullError("the queue is full", 3.0)
    answer = http.post("/v1/embeddings", json={"input": TEXTS})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")


def test_grpc_gives_the_same(doors: DoorThread, engine: FakeClient) -> None:
    with grpc.insecure_channel(doors.grpc_address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        inputs = [pb.EmbedInput(text=text) for text in TEXTS]
        answer = stub.Embed(pb.EmbedRequest(inputs=inputs, dimensions=4, normalize=False))
        for one, text in zip(answer.embeddings, TEXTS, strict=True):
            assert np.allclose(one.values, expected(doors, text, dimensions=4, normalize=False))
        tokens = [pb.EmbedInput(tokens=pb.TokenIds(ids=[5, 6]))]
        answer = stub.Embed(pb.EmbedRequest(request_id="mine", inputs=tokens))
        assert (answer.request_id, answer.usage.prompt_tokens) == ("mine", 2)
        assert np.allclose(answer.embeddings[0].values, expected(doors, [5, 6]))
        for request, param in (
            (pb.EmbedRequest(), "inputs"),
            (pb.EmbedRequest(inputs=[pb.EmbedInput()]), "inputs[0]"),
            (pb.EmbedRequest(inputs=[*inputs, *tokens]), "inputs"),
            (pb.EmbedRequest(inputs=inputs, dimensions=99), "dimensions"),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                stub.Embed(request)
            error: Any = refused.value
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert ("error-param", param) in error.trailing_metadata()
        engine.hang_after = 0
        num_before = len(engine.submitted)
        with pytest.raises(grpc.RpcError) as late:
            stub.Embed(pb.EmbedRequest(inputs=inputs), timeout=0.3)
        status: Any = late.value
        assert status.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        wait_for(lambda: len(engine.aborted) == len(engine.submitted) - num_before == 3)


def test_without_a_head_there_is_no_text(
    http: httpx.Client, doors: DoorThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    validator: Validator = doors.service.validator
    headless: ModelLimits = replace(validator.limits, has_lm_head=False)
    monkeypatch.setattr(validator, "limits", headless)
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True}),
    ):
        answer = http.post(path, json=body)
        assert answer.status_code == 400
        assert "the checkpoint has no LM head" in answer.json()["error"]["message"]
    assert http.get("/v1/models").status_code == http.post("/v1/embeddings", json={"input": "a"}).status_code == 200
