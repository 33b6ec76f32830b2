"""The OpenAI SDK as users have it, against a real server."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from manta.cluster.engine.client import DrainingError, EngineLostError, QueueFullError, UnavailableError
from manta.cluster.engine.types import Beams
from tests.support.door_server import DoorThread
from tests.support.fake_client import FakeClient

REPLY = "The quick brown fox, 你好 🙂🚀"


@pytest.fixture
def sdk(doors: DoorThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{doors.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def scripted(engine: FakeClient, doors: DoorThread) -> list[int]:
    """The fake model says REPLY and ends."""
    tokens = doors.service.validator.tokenizer.encode(REPLY, add_special_tokens=False)
    engine.model = lambda request: tokens
    return tokens


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_completion(sdk: openai.OpenAI, scripted: list[int]) -> None:
    answer = sdk.completions.create(model="tiny", prompt="hello", max_tokens=100)
    assert answer.choices[0].text == REPLY
    assert answer.choices[0].finish_reason == "stop"
    assert answer.id.startswith("cmpl-")
    assert answer.model == "tiny"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(scripted) + 1  # the end-of-sequence token counts
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == answer.usage.total_tokens


def test_streamed_completion_is_the_same_text(sdk: openai.OpenAI, scripted: list[int]) -> None:
    chunks = list(sdk.completions.create(model="tiny", prompt="hello", max_tokens=100, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == REPLY
    assert not any("\ufffd" in chunk.choices[0].text for chunk in chunks)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len(chunks) > 5


def test_default_max_tokens_is_16_for_completions(sdk: openai.OpenAI) -> None:
    answer = sdk.completions.create(model="tiny", prompt="hello")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_chat_fills_the_context(sdk: openai.OpenAI, doors: DoorThread, engine: FakeClient) -> None:
    answer = sdk.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
    assert answer.usage is not None
    assert answer.usage.total_tokens == 256
    assert answer.choices[0].finish_reason == "length"
    tokenizer = doors.service.validator.tokenizer
    assert tokenizer.decode(list(engine.submitted[0].prompt_token_ids)) == "<|user|>hi\n<|assistant|>"


def test_streamed_chat(sdk: openai.OpenAI, scripted: list[int]) -> None:
    stream = sdk.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == REPLY
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(scripted) + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_continuous_usage_counts_up(sdk: openai.OpenAI) -> None:
    options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    stream = sdk.completions.create(model="tiny", prompt="hello", max_tokens=9, stream=True, extra_body=options)
    counts = [chunk.usage.completion_tokens for chunk in stream if chunk.usage is not None]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 9


def test_n_draws_different_completions_and_counts_the_prompt_once(sdk: openai.OpenAI, engine: FakeClient) -> None:
    answer = sdk.completions.create(model="tiny", prompt=["hello", "world wide"], n=3, max_tokens=6, seed=5)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert len({choice.text for choice in answer.choices}) == 6
    assert [request.sampling.seed for request in engine.submitted] == [5, 6, 7, 5, 6, 7]
    first, second = engine.submitted[0].prompt_token_ids, engine.submitted[3].prompt_token_ids
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(first) + len(second)
    assert answer.usage.completion_tokens == 36
    alone = sdk.completions.create(model="tiny", prompt="world wide", max_tokens=6, seed=6)
    assert alone.choices[0].text == answer.choices[4].text


def test_streamed_n_interleaves_choices(sdk: openai.OpenAI) -> None:
    kwargs = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "n": 3, "max_tokens": 7, "seed": 1}
    whole = sdk.chat.completions.create(**kwargs)  # type: ignore[call-overload]
    texts = {0: "", 1: "", 2: ""}
    roles = []
    for chunk in sdk.chat.completions.create(**kwargs, stream=True):  # type: ignore[call-overload]
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.index] if choice.delta.role else []
    assert sorted(roles) == [0, 1, 2]
    assert texts == {choice.index: choice.message.content for choice in whole.choices}


def test_stop_string_over_token_borders(sdk: openai.OpenAI, scripted: list[int], engine: FakeClient) -> None:
    engine.hang_after = len(scripted)  # the engine itself never ends the request
    answer = sdk.completions.create(model="tiny", prompt="hello", max_tokens=100, stop=["ick bro", "never"])
    assert answer.choices[0].text == "The qu"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == "ick bro"  # type: ignore[attr-defined]
    wait_for(lambda: engine.aborted)


def test_token_prompts_echo_and_token_ids(sdk: openai.OpenAI, scripted: list[int]) -> None:
    extra = {"return_token_ids": True}
    answer = sdk.completions.create(model="tiny", prompt=[[300, 301], [40]], echo=True, max_tokens=3, extra_body=extra)
    for choice, prompt in zip(answer.choices, ([300, 301], [40]), strict=True):
        assert choice.prompt_token_ids == prompt  # type: ignore[attr-defined]
        assert choice.token_ids == scripted[:3]  # type: ignore[attr-defined]
        assert choice.text.endswith("The quick brown")
        assert len(choice.text) > len("The quick brown")


def test_cached_tokens_are_reported(sdk: openai.OpenAI) -> None:
    prompt = list(range(100, 140))
    cached = []
    for salt in ("a", "a", "b"):
        answer = sdk.completions.create(model="tiny", prompt=prompt, max_tokens=1, extra_body={"cache_salt": salt})
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert cached == [0, 32, 0]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": 101}, "temperature", "less than or equal to 100"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 300}, "max_tokens", "maximum context length is 256 tokens. However, you requested 301 tokens"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"n": 129}, "n", "128"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "between -100 and 100"),
        ({"logit_bias": {"512": 1}}, "logit_bias", "from 0 to 511"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "integer"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", "300"),
        ({"extra_body": {"allowed_token_ids": []}}, "allowed_token_ids", "at least 1"),
        ({"extra_body": {"allowed_token_ids": [3, 512]}}, "allowed_token_ids", "from 0 to 511"),
        ({"extra_body": {"bad_words": ["  "]}}, "bad_words", "not blank"),
        ({"extra_body": {"bad_words": ["x"] * 129}}, "bad_words", "128"),
        ({"extra_body": {"prompt_logprobs": 1}, "stream": True}, "prompt_logprobs", "stream=false"),
        ({"extra_body": {"top_logprobs": 2}}, "top_logprobs", "chat"),
        ({"extra_body": {"logit_biases": {}}}, "logit_biases", "did you mean 'logit_bias'?"),
        ({"extra_body": {"allowed_tokens": [1]}}, "allowed_tokens", "did you mean 'allowed_token_ids'?"),
        ({"best_of": 2, "n": 3}, "best_of", "at least n=3"),
        ({"best_of": 2, "extra_body": {"use_beam_search": 1}}, "use_beam_search", "boolean"),
        ({"logprobs": 2, "extra_body": {"use_beam_search": True}}, "logprobs", "not possible with use_beam_search"),
        ({"extra_body": {"length_penalty": 0.5}}, "length_penalty", "needs use_beam_search"),
        ({"stop": [""]}, "stop", "empty string"),
        ({"stop": ["x"] * 17}, "stop", "16"),
        ({"extra_body": {"temprature": 1}}, "temprature", "did you mean 'temperature'?"),
        ({"extra_body": {"guided_json": {}}}, "guided_json", "structured_outputs"),
        ({"extra_body": {"structured_output": {}}}, "structured_output", "structured_outputs"),
        ({"extra_body": {"top_k": "5"}}, "top_k", "integer"),
        ({"extra_body": {"stop_token_ids": [512]}}, "stop_token_ids", "from 0 to 511"),
        ({"prompt": [5, 512]}, "prompt", "from 0 to 511"),
        ({"prompt": []}, "prompt", "empty"),
        ({"extra_body": {"stream_options": {"include_usage": True}}}, "stream_options", "stream=true"),
    ],
)
def test_bad_request_names_the_field(
    sdk: openai.OpenAI, fields: dict[str, object], param: str, words: str, engine: FakeClient
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.completions.create(**({"model": "tiny", "prompt": [100]} | fields))  # type: ignore[call-overload]
    assert caught.value.param == param
    assert words in str(caught.value)
    assert caught.value.type == "BadRequestError"
    assert not engine.submitted


def test_unknown_model(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.completions.create(model="other", prompt="hello")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("other")
    assert [model.id for model in sdk.models.list()] == ["tiny"]
    assert sdk.models.retrieve("tiny").id == "tiny"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "code", "retry_after"),
    [
        (QueueFullError("4096 requests wait already", retry_after_s=7), "queue_full", "7"),
        (DrainingError("the engine is shutting down"), "draining", "1"),
        (UnavailableError("no replica runs"), "engine_unavailable", "1"),
        (EngineLostError("the engine is gone"), "engine_lost", "1"),
    ],
)
def test_engine_refusals_are_503_with_retry_after(
    sdk: openai.OpenAI, engine: FakeClient, refusal: Exception, code: str, retry_after: str, stream: bool
) -> None:
    engine.refusal = refusal  # type: ignore[assignment]
    with pytest.raises(openai.InternalServerError) as caught:
        sdk.completions.create(model="tiny", prompt="hello", stream=stream)
    assert caught.value.status_code == 503
    assert caught.value.code == code
    assert caught.value.response.headers["retry-after"] == retry_after


def test_error_in_mid_stream_reaches_the_sdk(sdk: openai.OpenAI, engine: FakeClient) -> None:
    engine.lost_after = 4
    stream = sdk.completions.create(model="tiny", prompt="hello", stream=True)
    with pytest.raises(openai.APIError, match="connection to the engine broke"):
        list(stream)


def test_many_at_once_get_what_each_gets_alone(sdk: openai.OpenAI) -> None:
    def ask(index: int) -> str:
        kwargs = {"model": "tiny", "prompt": [index + 10], "max_tokens": 20, "temperature": 0}
        if index % 2:
            return str(sdk.completions.create(**kwargs).choices[0].text)  # type: ignore[call-overload]
        chunks = sdk.completions.create(**kwargs, stream=True)  # type: ignore[call-overload]
        return "".join(chunk.choices[0].text for chunk in chunks)

    alone = [ask(index) for index in range(24)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(24))) == alone
    assert len(set(alone)) == 24


@pytest.mark.parametrize("n", [1, 3])
def test_closing_a_stream_aborts(sdk: openai.OpenAI, engine: FakeClient, n: int) -> None:
    engine.hang_after = 2
    stream = sdk.completions.create(model="tiny", prompt="hello", stream=True, n=n)
    next(iter(stream))
    assert not engine.aborted
    stream.close()
    wait_for(lambda: len(engine.aborted) == n)


def test_timeout_of_a_client_that_does_not_stream_aborts(
    sdk: openai.OpenAI, engine: FakeClient, doors: DoorThread
) -> None:
    engine.hang_after = 0
    with pytest.raises(openai.APITimeoutError):
        sdk.with_options(timeout=0.3).completions.create(model="tiny", prompt="hello")
    wait_for(lambda: engine.aborted)
    wait_for(lambda: len(doors.service.running) == 0)


def test_several_completions_are_submitted_together(sdk: openai.OpenAI, engine: FakeClient) -> None:
    prompt = list(range(100, 200))
    answer = sdk.completions.create(model="tiny", prompt=prompt, n=4, seed=1)
    assert len({choice.text for choice in answer.choices}) == 4
    (group,) = engine.groups
    assert [request.sampling.seed for request in group.requests] == [1, 2, 3, 4]
    assert group.is_closed
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0  # what was there before the call


def test_those_that_follow_a_grammar_are_submitted_when_the_first_has_read_the_prompt(
    sdk: openai.OpenAI, engine: FakeClient
) -> None:
    """So that they find it in the prefix cache."""
    engine.hang_after = 0
    body = {"structured_outputs": {"choice": ["a", "b"]}}
    with pytest.raises(openai.APITimeoutError):
        sdk.with_options(timeout=0.3).completions.create(
            model="tiny", prompt=list(range(100, 200)), n=4, extra_body=body
        )
    assert len(engine.submitted) == 1
    assert not engine.groups


def test_of_best_of_the_most_probable_are_told(sdk: openai.OpenAI, engine: FakeClient) -> None:
    several = sdk.completions.create(model="tiny", prompt="x", n=5, seed=1, logprobs=0)
    scores = [sum(choice.logprobs.token_logprobs or ()) for choice in several.choices if choice.logprobs]
    best = sorted(range(5), key=lambda place: -scores[place])
    chosen = sdk.completions.create(model="tiny", prompt="x", n=2, best_of=5, seed=1)
    assert [choice.text for choice in chosen.choices] == [several.choices[place].text for place in best[:2]]
    assert [choice.index for choice in chosen.choices] == [0, 1]
    assert all(choice.logprobs is None for choice in chosen.choices)


def test_beams_reach_the_engine(sdk: openai.OpenAI, engine: FakeClient) -> None:
    search = {"use_beam_search": True, "length_penalty": 0.5, "early_stopping": "never"}
    sdk.completions.create(model="tiny", prompt="x", n=2, best_of=5, extra_body=search)
    (group,) = engine.groups
    assert [request.beams for request in group.requests] == [Beams(5, 0.5, "never")] * 2


def test_draining_refuses_new_calls(sdk: openai.OpenAI, doors: DoorThread) -> None:
    doors.service.running.is_draining = True
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            sdk.completions.create(model="tiny", prompt="x")
        assert (caught.value.status_code, caught.value.code) == (503, "draining")
        assert caught.value.response.headers["retry-after"] == "1"
    finally:
        doors.service.running.is_draining = False
