"""One model behind HTTP, gRPC and LLM: the same fields give the same tokens, texts, reasons and log-probabilities."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import grpc
import httpx
import openai
import pytest
import torch
from pydantic import BaseModel, Field

from manta import LLM, SamplingParams
from manta.protos import inference_pb2 as pb
from manta.protos import inference_pb2_grpc as pb_grpc
from tests.support.checkpoints import make_checkpoint
from tests.support.rpc_requests import chat_request, generate_request
from tests.support.server import ServerProcess
from tests.support.small_tokenizers import TEXTS, VOCAB_SIZE, write_model_folder

PROMPT = TEXTS[0]
FIELDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.2, "seed": 11, "top_k": 40, "top_p": 0.9},
    "logprobs": {"logprobs": 4, "prompt_logprobs": 2},
    "logprobs of changed logits": {"logprobs": 0, "repetition_penalty": 1.4, "presence_penalty": 0.3},
    "logit_bias": {"logit_bias": {300: 6.5, 301: -100.0, 7: 3.0}, "logprobs": 1},
    "allowed_token_ids": {"allowed_token_ids": [*range(40, 60), 300], "temperature": 1.0, "seed": 1},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 5, "prompt_logprobs": 0},
    "truncate to what fits": {"truncate_prompt_tokens": -1, "max_tokens": 490},
    "special tokens": {"logit_bias": {3: 100.0}, "max_tokens": 3},
    "special tokens written": {"logit_bias": {3: 100.0}, "max_tokens": 3, "skip_special_tokens": False},
    "min_tokens": {"logit_bias": {1: 100.0}, "min_tokens": 3, "ignore_eos": False},
    "json": {"structured_outputs": {"json": {"enum": ["a", 1, None]}}, "logprobs": 1, "ignore_eos": False},
    "json_object": {"structured_outputs": {"json_object": True}, "temperature": 1.0, "seed": 7},
    "regex": {"structured_outputs": {"regex": "(x|yz)+"}, "temperature": 1.0, "seed": 2, "ignore_eos": False},
    "choice": {"structured_outputs": {"choice": ["red", "green"]}, "frequency_penalty": 0.5},
    "grammar": {"structured_outputs": {"grammar": 'root ::= "<" root? ">"'}, "ignore_eos": False},
}


@dataclass
class Answer:
    """As every door gives it."""

    token_ids: list[int]
    text: str
    finish_reason: str
    stop_reason: str | int | None
    logprobs: list[float] | None
    best: list[list[float]] | None
    prompt_logprobs: list[float] | None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_checkpoint(
        write_model_folder(tmp_path_factory.mktemp("model")), "llama", vocab_size=VOCAB_SIZE, eos_token_id=1
    )


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    words = [
        str(folder), "--served-model-name", "tiny", "--dtype", "float32", "--kv-cache-memory-bytes", "8MiB",
        "--distributed-executor-backend", "local", "--max-num-seqs", "8", "--port", "0", "--grpc-port", "0",
    ]  # fmt: skip
    with ServerProcess(*words) as process:
        yield process.wait_ready()


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), dtype="float32", max_num_seqs=8, kv_cache_memory_bytes="8MiB") as llm:
        yield llm


def over_http(server: ServerProcess, fields: dict[str, Any], prompt: str) -> Answer:
    body = {"prompt": prompt, "return_token_ids": True} | fields
    if "logit_bias" in body:
        body["logit_bias"] = {str(token): bias for token, bias in body["logit_bias"].items()}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    logprobs, told = choice["logprobs"], choice.get("prompt_logprobs")
    return Answer(
        choice["token_ids"],
        choice["text"],
        choice["finish_reason"],
        choice["stop_reason"],
        logprobs and logprobs["token_logprobs"],
        logprobs and [list(top.values())[: fields["logprobs"]] for top in logprobs["top_logprobs"]],
        told and [next(iter(one.values()))["logprob"] for one in told[1:]],
    )


def over_grpc(server: ServerProcess, fields: dict[str, Any], prompt: str) -> Answer:
    fields = dict(fields)
    if "structured_outputs" in fields:
        ((kind, value),) = fields["structured_outputs"].items()
        value = {"json": json.dumps, "choice": lambda texts: pb.Choices(texts=texts)}.get(kind, lambda same: same)(
            value
        )
        fields["structured_outputs"] = pb.StructuredOutputs(**{kind: value})
    request = pb.GenerateRequest(text=prompt, sampling=pb.SamplingParams(**fields))
    with grpc.insecure_channel(server.grpc_address) as channel:
        (response,) = pb_grpc.InferenceStub(channel).Generate(request, timeout=60)
    asks = "logprobs" in fields
    return Answer(
        list(response.token_ids),
        response.text,
        response.finish_reason,
        response.stop_string if response.HasField("stop_string")
        else response.stop_token_id if response.HasField("stop_token_id") else None,
        [one.logprob for one in response.logprobs] if asks else None,
        [list(one.top_logprobs) for one in response.logprobs] if asks else None,
        [one.logprob for one in response.prompt_logprobs] if "prompt_logprobs" in fields else None,
    )  # fmt: skip


def offline(llm: LLM, fields: dict[str, Any], prompt: str) -> Answer:
    (output,) = llm.generate(prompt, SamplingParams(**fields), use_tqdm=False)
    one = output.outputs[0]
    best = None
    if one.logprobs is not None:
        best = [sorted((e.logprob for e in each.values()), reverse=True)[: fields["logprobs"]] for each in one.logprobs]
    told = output.prompt_logprobs
    return Answer(
        one.token_ids,
        one.text,
        str(one.finish_reason),
        one.stop_reason,
        one.logprobs and [next(iter(each.values())).logprob for each in one.logprobs],
        best,
        told and [next(iter(each.values())).logprob for each in told[1:] if each is not None],
    )


def assert_equal(answers: list[Answer]) -> None:
    first, *others = answers
    for other in others:
        for name in ("token_ids", "text", "finish_reason", "stop_reason"):
            assert getattr(other, name) == getattr(first, name), name
        for name in ("logprobs", "best", "prompt_logprobs"):
            ours, theirs = getattr(first, name), getattr(other, name)
            assert (ours is None) == (theirs is None)
            if name == "best" and ours is not None:
                ours, theirs = list(chain.from_iterable(ours)), list(chain.from_iterable(theirs))
            assert theirs == (None if ours is None else pytest.approx(ours, abs=1e-5))


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_doors_agree(server: ServerProcess, llm: LLM, fields: dict[str, Any]) -> None:
    fields = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True} | fields
    answers = [over_http(server, fields, PROMPT), over_grpc(server, fields, PROMPT), offline(llm, fields, PROMPT)]
    assert_equal(answers)


def test_doors_agree_about_ends(server: ServerProcess, llm: LLM) -> None:
    fields: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, "logprobs": 0}
    whole = offline(llm, fields, PROMPT)
    middle = len(whole.text) // 2
    ends: list[dict[str, Any]] = [
        {"stop": [whole.text[middle : middle + 2]]},
        {"stop_token_ids": [whole.token_ids[7]]},
        {"bad_words": [whole.text[middle : middle + 3]]},
    ]
    for end in ends:
        for include in (False, True):
            asked = fields | end | {"include_stop_str_in_output": include}
            answers = [over_http(server, asked, PROMPT), over_grpc(server, asked, PROMPT), offline(llm, asked, PROMPT)]
            assert_equal(answers)
            assert "bad_words" in end or answers[0].finish_reason == "stop"


def test_skipped_special_tokens(server: ServerProcess) -> None:
    fields = {"temperature": 0.0, "max_tokens": 2, "logit_bias": {3: 100.0}, "bad_words": []}
    assert over_http(server, fields, PROMPT).text == ""
    assert over_http(server, fields | {"skip_special_tokens": False}, PROMPT).text == "<|user|>" * 2


def test_schemas_of_openai_clients(server: ServerProcess) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    class Person(BaseModel):
        age: Annotated[int, Field(ge=0, le=130)]
        colour: Literal["red", "green"]

    messages: Any = [{"role": "user", "content": PROMPT}]
    told = client.chat.completions.parse(
        model="tiny", messages=messages, response_format=Person, max_tokens=150, seed=1
    )
    assert isinstance(told.choices[0].message.parsed, Person)
    schema: Any = {"name": "x", "schema": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}}
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=150, n=2, seed=3,
        response_format={"type": "json_schema", "json_schema": schema},
    )  # fmt: skip
    for choice in answer.choices:
        values = json.loads(str(choice.message.content))
        assert 2 <= len(values) <= 3
        assert {type(value) for value in values} == {bool}


def test_a_bad_grammar_is_refused_at_both_doors(server: ServerProcess) -> None:
    bad = {"structured_outputs": {"regex": "(ab"}}
    response = httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT} | bad, timeout=60)
    assert response.status_code == 400
    assert "parenthesis" in response.json()["error"]["message"]
    with pytest.raises(grpc.RpcError) as raised:
        over_grpc(server, bad, PROMPT)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "parenthesis" in raised.value.details()


SEVERAL: dict[str, dict[str, Any]] = {
    "samples": {"n": 3, "seed": 11, "temperature": 0.7, "logprobs": 2},
    "best_of": {"n": 2, "best_of": 4, "seed": 3, "temperature": 1.0},
    "beams": {"n": 2, "best_of": 4, "use_beam_search": True, "length_penalty": 0.5, "early_stopping": "never"},
    "samples of a grammar": {"n": 2, "seed": 5, "structured_outputs": {"regex": "(x|yz)+"}, "temperature": 1.0},
}


@pytest.mark.parametrize("fields", SEVERAL.values(), ids=SEVERAL.keys())
def test_doors_agree_about_several_completions(server: ServerProcess, llm: LLM, fields: dict[str, Any]) -> None:
    fields = {"max_tokens": 10} | fields
    body = {"prompt": PROMPT, "return_token_ids": True} | fields
    choices = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"]
    expected = [(choice["token_ids"], choice["text"], choice["finish_reason"]) for choice in choices]
    assert len(expected) == fields["n"]
    with grpc.insecure_channel(server.grpc_address) as channel:
        for stream in (False, True):
            request = generate_request({"prompt": PROMPT} | fields, stream=stream)
            responses = list(pb_grpc.InferenceStub(channel).Generate(request, timeout=60))
            for index, one in enumerate(expected):
                mine = [response for response in responses if response.index == index]
                token_ids = [token for response in mine for token in response.token_ids]
                assert (token_ids, "".join(response.text for response in mine), mine[-1].finish_reason) == one
            assert responses[-1].HasField("usage")
    (output,) = llm.generate(PROMPT, SamplingParams(**fields), use_tqdm=False)
    assert [(one.token_ids, one.text, one.finish_reason) for one in output.outputs] == expected


def test_doors_agree_about_echoed_prompts(server: ServerProcess) -> None:
    for fields in ({"max_tokens": 0, "logprobs": 1}, {"max_tokens": 3, "n": 2, "seed": 1}):
        body: dict[str, Any] = {"prompt": PROMPT, "echo": True} | fields
        choices = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"]
        with grpc.insecure_channel(server.grpc_address) as channel:
            responses = list(pb_grpc.InferenceStub(channel).Generate(generate_request(body), timeout=60))
        assert [one.text for one in responses] == [choice["text"] for choice in choices]
        assert responses[0].text.startswith(PROMPT)
        if "logprobs" in fields:
            told = choices[0]["logprobs"]["token_logprobs"]
            assert [one.logprob for one in responses[0].prompt_logprobs] == pytest.approx(told[1:], abs=1e-5)
            assert len(responses[0].prompt_token_ids) == len(told)
            assert not responses[0].token_ids


def test_doors_agree_about_chats(server: ServerProcess, llm: LLM) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": PROMPT}]
    fields: dict[str, Any] = {"max_tokens": 12, "n": 2, "seed": 4, "temperature": 0.8}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": messages} | fields, timeout=60).json()
    expected = [choice["message"]["content"] for choice in answer["choices"]]
    with grpc.insecure_channel(server.grpc_address) as channel:
        for stream in (False, True):
            request = chat_request({"messages": messages} | fields, stream=stream)
            responses = list(pb_grpc.InferenceStub(channel).Chat(request, timeout=60))
            texts = ["".join(one.content for one in responses if one.index == index) for index in range(2)]
            assert texts == expected
            assert responses[-1].usage.prompt_tokens == answer["usage"]["prompt_tokens"]
    (output,) = llm.chat(messages, SamplingParams(**fields), use_tqdm=False)
    assert [one.text for one in output.outputs] == expected
