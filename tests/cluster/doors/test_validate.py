"""The validator by itself: limits, defaults, truncation, fan-out."""

import asyncio
import random
import threading
from typing import Any

import pytest

from manta.cluster.doors.errors import Kind, RequestError
from manta.cluster.doors.fields import COMPLETION, IGNORED, NOT_SUPPORTED, check_fields
from manta.cluster.doors.limits import ModelLimits
from manta.cluster.doors.text import Tokenizer
from manta.cluster.doors.validate import MAX_CUT_CHARACTERS, THREAD_CHARACTERS, Ask, Resolved, Validator
from tests.support.small_tokenizers import VOCAB_SIZE, byte_level

TOKENIZER = Tokenizer(byte_level())


def resolve(prompt: Any, max_model_len: int = 100, defaults: dict[str, Any] | None = None, **fields: Any) -> Resolved:
    limits = ModelLimits("tiny", VOCAB_SIZE, max_model_len, sampling_defaults=defaults or {})
    names = Ask.__dataclass_fields__
    ask = Ask(
        prompt=prompt,
        sampling={name: value for name, value in fields.items() if name not in names},
        **{name: value for name, value in fields.items() if name in names},
    )
    return asyncio.run(Validator(limits, TOKENIZER, random.Random(0)).resolve(ask, "id"))


def refused(prompt: Any, **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        resolve(prompt, **fields)
    return caught.value


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "fits"),
    [(99, 1, True), (99, 2, False), (84, 16, True), (84, 17, False), (100, 1, False)],
)
def test_prompt_and_output_share_the_context(num_prompt: int, max_tokens: int, fits: bool) -> None:
    if fits:
        assert resolve([9] * num_prompt, max_tokens=max_tokens).requests[0].sampling.max_tokens == max_tokens
        return
    error = refused([9] * num_prompt, max_tokens=max_tokens)
    total = num_prompt + max_tokens
    assert error.message.startswith(
        f"This model's maximum context length is 100 tokens. However, you requested {total} tokens "
        f"({num_prompt} in the prompt, {max_tokens} in the completion)."
    )
    assert error.code == "context_length_exceeded"


@pytest.mark.parametrize(("fills", "expected"), [(False, [16, 10]), (True, [90, 10])])
def test_default_max_tokens_never_exceeds_the_rest(fills: bool, expected: list[int]) -> None:
    got = [resolve([9] * length, fills_context=fills).requests[0].sampling.max_tokens for length in (10, 90)]
    assert got == expected


def test_model_defaults_yield_to_the_request() -> None:
    defaults = {"temperature": 0.5, "top_k": 3, "max_tokens": 7}
    sampling = resolve([9], defaults=defaults, fills_context=True, top_k=0).requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (0.5, 0, 7)
    assert resolve([9], defaults=defaults).requests[0].sampling.max_tokens == 16


@pytest.mark.parametrize(("truncate", "kept"), [(1, 1), (30, 30), (100, 70), (-1, 70)])
def test_truncation_keeps_the_last_tokens(truncate: int, kept: int) -> None:
    prompt = list(range(10, 80))
    resolved = resolve(prompt, truncate_prompt_tokens=truncate, max_tokens=20)
    assert resolved.prompts == [prompt[-kept:]]


def test_truncation_to_what_fits() -> None:
    prompt = list(range(10, 300))
    assert resolve(prompt, truncate_prompt_tokens=-1, max_tokens=20).prompts == [prompt[-80:]]
    huge = refused("a" * (MAX_CUT_CHARACTERS + 1), truncate_prompt_tokens=5)
    assert (huge.param, huge.code) == ("prompt", "context_length_exceeded")
    assert len(resolve("word " * 400, truncate_prompt_tokens=-1, fills_context=True).prompts[0]) == 99
    for bad in (0, -2, 101, "5", True):
        assert refused(prompt, truncate_prompt_tokens=bad).param == "truncate_prompt_tokens"


def test_fan_out_is_prompt_major_with_seeds_of_its_own() -> None:
    resolved = resolve([[30], [40, 41]], n=3, seed=-1, priority=4, cache_salt="s")
    assert [request.request_id for request in resolved.requests] == [f"id-{index}" for index in range(6)]
    assert [request.sampling.seed for request in resolved.requests] == [2**64 - 1, 0, 1] * 2
    assert all(request.sampling.n == 1 for request in resolved.requests)
    assert {(request.priority, request.cache_salt) for request in resolved.requests} == {(4, "s")}
    assert resolved.num_prompt_tokens == 3
    unseeded = [resolve("Hello", n=2).requests[index].sampling.seed for index in range(2)]
    assert unseeded[1] == unseeded[0] + 1  # type: ignore[operator]


@pytest.mark.parametrize(
    ("prompt", "fields", "param"),
    [
        (None, {}, "prompt"),
        ({"a": 1}, {}, "prompt"),
        (["a", 5], {}, "prompt"),
        ([5, True], {}, "prompt"),
        ([5, 1.0], {}, "prompt"),
        ([[5], [-1]], {}, "prompt"),
        (["a"] * 1025, {}, "prompt"),
        ("", {}, "prompt"),
        (["a", ""], {}, "prompt"),
        (["a"] * 100, {"n": 100}, "n"),
        ("a", {"n": True}, "n"),
        ("a", {"temperature": "0.5"}, "temperature"),
        ("a", {"temperature": float("nan")}, "temperature"),
        ("a", {"seed": 2**64}, "seed"),
        ("a", {"stop": "x" * 1025}, "stop"),
        ("a", {"stop": [5]}, "stop"),
        ("a", {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        ("a", {"stop_token_ids": [0] * 129}, "stop_token_ids"),
        ("a", {"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ([9] * 98, {"min_tokens": 5, "fills_context": True}, "min_tokens"),
        ("a", {"priority": 2**31}, "priority"),
        ("a", {"cache_salt": 5}, "cache_salt"),
        ("a", {"add_special_tokens": "no"}, "add_special_tokens"),
        ("a", {"model": 5}, "model"),
    ],
)
def test_refusals(prompt: Any, fields: dict[str, Any], param: str) -> None:
    error = refused(prompt, **fields)
    assert error.param == param
    assert error.kind is Kind.INVALID
    assert error.code


def test_a_text_that_can_never_fit_is_refused_before_it_is_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "encode", lambda *args: pytest.fail("tokenized"))
    assert refused("x" * 1_000_000).code == "context_length_exceeded"


def test_long_texts_are_tokenized_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        threads.append(threading.current_thread())
        return [9]

    monkeypatch.setattr(TOKENIZER, "encode", encode)
    resolve(["a" * (THREAD_CHARACTERS - 1), "a" * THREAD_CHARACTERS], max_model_len=100_000)
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


def test_many_prompts_leave_the_event_loop_to_others() -> None:
    turns = 0

    async def work() -> None:
        nonlocal turns
        limits = ModelLimits("tiny", VOCAB_SIZE, 100)
        resolving = asyncio.create_task(
            Validator(limits, TOKENIZER, random.Random(0)).resolve(Ask(prompt=["abc"] * 50, sampling={}), "id")
        )
        while not resolving.done():
            turns += 1
            await asyncio.sleep(0)

    asyncio.run(work())
    assert turns >= 50


def test_every_field_is_in_one_place_only() -> None:
    assert not COMPLETION & IGNORED
    assert not (COMPLETION | IGNORED) & NOT_SUPPORTED.keys()


@pytest.mark.parametrize("name", sorted(NOT_SUPPORTED))
def test_unsupported_fields_are_refused_unless_they_ask_for_nothing(name: str) -> None:
    for value in (None, *NOT_SUPPORTED[name]):
        assert check_fields({name: value}, COMPLETION) == {}
    with pytest.raises(RequestError, match="not supported") as caught:
        check_fields({name: {"something": 1}}, COMPLETION)
    assert caught.value.param == name


def test_zero_is_not_false() -> None:
    with pytest.raises(RequestError, match="spaces_between_special_tokens is not supported"):
        check_fields({"spaces_between_special_tokens": 1}, COMPLETION)


def test_fields_that_constrain_tokens_reach_the_engine() -> None:
    (request,) = resolve(
        "Hello",
        logit_bias={"7": -100, "9": 2.5},
        allowed_token_ids=[5, 9, 5],
        bad_words=["fox", "Hello"],
        logprobs=3,
        prompt_logprobs=0,
    ).requests
    sampling = request.sampling
    assert sampling.logit_bias == {7: -100.0, 9: 2.5}
    assert sampling.allowed_token_ids == (5, 9)
    assert (sampling.logprobs, sampling.prompt_logprobs) == (3, 0)
    words = {TOKENIZER.decode(word) for word in request.bad_words}
    assert words == {"fox", " fox", "Hello", " Hello"}


def test_no_tokens_are_for_those_who_echo() -> None:
    assert refused("Hello", max_tokens=0).param == "max_tokens"
    resolved = resolve("Hello", max_tokens=0, echoes=True)
    assert resolved.is_prompt_only
    assert resolved.requests[0].sampling.max_tokens == 1
    assert not resolve("Hello", max_tokens=1, echoes=True).is_prompt_only


def test_encoding_is_that_of_transformers() -> None:
    for text in ("Hello 你好", "<|user|> hi </s>", "  spaces\n\n", ""):
        for add_special_tokens in (True, False):
            expected = TOKENIZER.hf.encode(text, add_special_tokens=add_special_tokens)
            assert TOKENIZER.encode(text, add_special_tokens) == expected


def test_a_long_text_leaves_the_event_loop_to_others() -> None:
    async def count_turns() -> int:
        validator = Validator(ModelLimits("tiny", VOCAB_SIZE, 10), TOKENIZER, random.Random(0))
        encoding = asyncio.create_task(validator.encode("hello world " * 20_000))
        num_turns = 0
        while not encoding.done():
            await asyncio.sleep(0)
            num_turns += 1
        return num_turns

    assert asyncio.run(count_turns()) > 100  # a handful if the tokenizer held the interpreter's lock
