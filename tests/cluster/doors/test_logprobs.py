"""How log-probabilities are written: the OpenAI SDK's objects, streamed and not, echoes as evaluation harnesses read
them, and gRPC. The fake engine says -id / 8 of each token, and that 5, 6, 7, ... are the best with -0.25, -0.5, ..."""

from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import openai
import pytest

from manta.cluster.doors.logprob_format import TokenNames
from manta.cluster.doors.text import Tokenizer
from manta.cluster.engine.logprobs import Logprob, Records, read_records
from manta.protos import inference_pb2 as pb
from manta.protos import inference_pb2_grpc as pb_grpc
from tests.support.door_server import DoorThread
from tests.support.fake_client import FakeClient, fake_records
from tests.support.small_tokenizers import byte_fallback, byte_level

REPLY = "The fox 🙂"


@pytest.fixture
def sdk(doors: DoorThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{doors.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def tokenizer(doors: DoorThread) -> Tokenizer:
    return doors.service.validator.tokenizer


@pytest.fixture
def reply(engine: FakeClient, tokenizer: Tokenizer) -> list[int]:
    """The tokens that the fake model says, its end included."""
    tokens = tokenizer.encode(REPLY, add_special_tokens=False)
    engine.model = lambda request: tokens
    return [*tokens, 1]


def pieces_of(tokenizer: Tokenizer, tokens: list[int]) -> list[bytes]:
    return [tokenizer.bytes_of(token) for token in tokens]


def test_completion(sdk: openai.OpenAI, reply: list[int], tokenizer: Tokenizer) -> None:
    choice = sdk.completions.create(model="tiny", prompt="hi", max_tokens=50, logprobs=2).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [-token / 8 for token in reply]
    pieces = pieces_of(tokenizer, reply)
    assert b"".join(pieces).decode() == REPLY + "</s>"
    assert choice.logprobs.tokens is not None
    for name, piece in zip(choice.logprobs.tokens, pieces, strict=True):
        try:
            assert name == piece.decode()
        except UnicodeDecodeError:
            assert name == "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
    assert choice.logprobs.top_logprobs is not None
    for token, name, top in zip(reply, choice.logprobs.tokens, choice.logprobs.top_logprobs, strict=True):
        assert len(top) == 3
        assert list(top.items())[2] == (name, -token / 8)
        assert list(top.values())[:2] == [-0.25, -0.5]
    assert choice.logprobs.text_offset is not None
    begins = [len(b"".join(pieces[:place]).decode(errors="ignore")) for place in range(len(pieces))]
    assert choice.logprobs.text_offset == begins


def test_streamed_completion_is_the_same(sdk: openai.OpenAI, reply: list[int], engine: FakeClient) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "hi", "max_tokens": 50, "logprobs": 1, "echo": True}
    whole = sdk.completions.create(**asked).choices[0].logprobs
    assert whole is not None
    engine.tokens_per_chunk = 2
    parts = [chunk.choices[0].logprobs for chunk in sdk.completions.create(**asked, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [one for part in parts if part is not None for one in getattr(part, name)]
        assert joined == getattr(whole, name)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_as_evaluation_harnesses_read_it(
    sdk: openai.OpenAI, max_tokens: int, reply: list[int], tokenizer: Tokenizer
) -> None:
    prompt = tokenizer.encode("Hello quick world", add_special_tokens=False)
    answer = sdk.completions.create(model="tiny", prompt=prompt, max_tokens=max_tokens, logprobs=1, echo=True)
    choice = answer.choices[0]
    assert choice.logprobs is not None
    assert choice.text == "Hello quick world" + ("The" if max_tokens else "")
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), max_tokens)
    logprobs, tops = choice.logprobs.token_logprobs, choice.logprobs.top_logprobs
    assert logprobs is not None
    assert tops is not None
    ids = prompt + reply[:max_tokens]
    assert logprobs == [None] + [-token / 8 for token in ids[1:]]
    assert tops[0] is None
    assert all(max(top.values()) == -0.25 for top in tops[1:])
    assert choice.logprobs.text_offset is not None
    begins = [len(tokenizer.decode(ids[:place])) for place in range(len(ids))]
    assert choice.logprobs.text_offset == begins


def test_several_prompts_with_several_completions_each(
    sdk: openai.OpenAI, reply: list[int], engine: FakeClient
) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": [[9, 10, 11], [12]], "n": 2, "max_tokens": 2, "logprobs": 0, "echo": True,
    }  # fmt: skip
    answer = sdk.completions.create(**asked)
    got = [choice.logprobs.token_logprobs for choice in answer.choices if choice.logprobs is not None]
    said = [-token / 8 for token in reply[:2]]
    assert got == [[None, -1.25, -1.375, *said]] * 2 + [[None, *said]] * 2
    assert [one.sampling.prompt_logprobs for one in engine.submitted].count(0) == 2, "a prompt is scored once"
    streamed: dict[int, list[float | None]] = {index: [] for index in range(4)}
    for chunk in sdk.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        assert choice.logprobs is not None
        streamed[choice.index] += choice.logprobs.token_logprobs or []
    assert list(streamed.values()) == got


@pytest.mark.parametrize("num_best", [None, 2])
def test_chat(sdk: openai.OpenAI, reply: list[int], num_best: int | None, tokenizer: Tokenizer) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "logprobs": True}
    if num_best is not None:
        asked["top_logprobs"] = num_best
    choice = sdk.chat.completions.create(**asked).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert [one.logprob for one in content] == [-token / 8 for token in reply]
    assert [bytes(one.bytes or []) for one in content] == pieces_of(tokenizer, reply)
    for one in content:
        assert [top.logprob for top in one.top_logprobs] == [-0.25, -0.5][: num_best or 0]
        assert [bytes(top.bytes or []) for top in one.top_logprobs] == pieces_of(tokenizer, [5, 6])[: num_best or 0]
    streamed = [
        one
        for chunk in sdk.chat.completions.create(**asked, stream=True)
        if chunk.choices[0].logprobs is not None
        for one in chunk.choices[0].logprobs.content or []
    ]
    assert [one.model_dump() for one in streamed] == [one.model_dump() for one in content]


def test_top_logprobs_need_logprobs(http: httpx.Client) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    for extra, param in (
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
    ):
        assert http.post("/v1/chat/completions", json=body | extra).json()["error"]["param"] == param
    for extra in ({"logprobs": False, "top_logprobs": 0}, {"logprobs": None}, {"logprobs": False}):
        assert http.post("/v1/chat/completions", json=body | extra).json()["choices"][0]["logprobs"] is None


def test_prompt_logprobs(http: httpx.Client, reply: list[int], tokenizer: Tokenizer) -> None:
    body: dict[str, Any] = {"prompt": [9, 5, 300], "max_tokens": 1, "prompt_logprobs": 1}
    told = http.post("/v1/completions", json=body).json()["choices"][0]["prompt_logprobs"]
    five = {"logprob": -0.625, "rank": 1, "decoded_token": tokenizer.token_text(5)}
    last = {"logprob": -37.5, "rank": 1, "decoded_token": tokenizer.token_text(300)}
    best = {"logprob": -0.25, "rank": 1, "decoded_token": tokenizer.token_text(5)}
    assert told == [None, {"5": five}, {"300": last, "5": best}]
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "prompt_logprobs": 0}
    answer = http.post("/v1/chat/completions", json=chat | {"return_token_ids": True}).json()
    assert [next(iter(one)) for one in answer["prompt_logprobs"][1:]] == [
        str(id) for id in answer["prompt_token_ids"][1:]
    ]
    echoed = http.post("/v1/completions", json=body | {"echo": True, "logprobs": 3}).json()["choices"][0]
    assert echoed["prompt_logprobs"] == told
    assert len(echoed["logprobs"]["top_logprobs"][2]) == 4


def test_tokens_by_their_ids(http: httpx.Client, reply: list[int]) -> None:
    body = {"prompt": "x", "max_tokens": 2, "logprobs": 1, "return_tokens_as_token_ids": True}
    logprobs = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{token}" for token in reply[:2]]
    assert logprobs["top_logprobs"][0] == {"token_id:5": -0.25, f"token_id:{reply[0]}": -reply[0] / 8}


@pytest.mark.parametrize("stream", [False, True])
def test_grpc(doors: DoorThread, reply: list[int], stream: bool) -> None:
    sampling = pb.SamplingParams(max_tokens=50, logprobs=2, prompt_logprobs=0)
    request = pb.GenerateRequest(tokens=pb.TokenIds(ids=[9, 10, 11]), sampling=sampling, stream=stream)
    with grpc.insecure_channel(doors.grpc_address) as channel:
        responses = list(pb_grpc.InferenceStub(channel).Generate(request))
    assert [(one.token_id, one.logprob) for one in responses[0].prompt_logprobs] == [(10, -1.25), (11, -1.375)]
    assert not any(response.prompt_logprobs for response in responses[1:])
    told = [one for response in responses for one in response.logprobs]
    assert [(one.token_id, one.logprob, one.rank) for one in told] == [(t, -t / 8, t % 5 + 1) for t in reply]
    assert all((list(one.top_ids), list(one.top_logprobs)) == ([5, 6], [-0.25, -0.5]) for one in told)


def test_a_stop_string_cuts_the_records_too(sdk: openai.OpenAI, reply: list[int], engine: FakeClient) -> None:
    engine.tokens_per_chunk = 100
    asked: dict[str, Any] = {"model": "tiny", "prompt": "hi", "max_tokens": 50, "logprobs": 0, "stop": "fo"}
    answer = sdk.completions.create(**asked)
    assert answer.choices[0].text == "The "
    assert answer.usage is not None
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.token_logprobs == [-t / 8 for t in reply[: answer.usage.completion_tokens]]
    assert answer.usage.completion_tokens < len(reply)


def test_names_of_tokens_of_other_vocabularies() -> None:
    """Where words begin with U+2581 and unknown characters are bytes."""
    tokenizer = Tokenizer(byte_fallback())
    ids = tokenizer.encode("the wer 你", add_special_tokens=False)
    assert b"".join(tokenizer.bytes_of(token) for token in ids).decode() == " the wer 你"
    names = [TokenNames(tokenizer, by_id=False).name(token, "bytes:") for token in ids[-3:]]
    assert names == ["bytes:\\xe4", "bytes:\\xbd", "bytes:\\xa0"]


def test_records_by_token() -> None:
    tokenizer = Tokenizer(byte_level())
    records = read_records(fake_records([6, 300], 2), 2)
    assert records == Records([-0.75, -37.5], [2, 1], [[5, 6], [5, 6]], [[-0.25, -0.5], [-0.25, -0.5]])
    first, second = records.by_token([6, 300], tokenizer.token_text)
    assert list(first) == [6, 5]
    assert second[300] == Logprob(-37.5, 1, tokenizer.token_text(300))
    assert [one.rank for one in second.values()] == [1, 1, 2]
    with pytest.raises(ValueError):
        read_records(bytes(20), 2)
