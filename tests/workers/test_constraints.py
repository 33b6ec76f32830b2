"""Random combinations of everything a request can ask of its tokens, against an oracle in float64 that goes token by
token; in all forms of the sampler: the CPU's kernel, torch's operations, and the GPU's kernels where they can run."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manta.kernels import ops
from manta.kernels.cpu_ops import RowSampler
from manta.protos.sampling_pb2 import Sampling
from manta.workers.columns import PlanError
from manta.workers.draws import uniform
from manta.workers.sampler import Sampler
from manta.workers.sampling_table import SamplingTable
from manta.workers.token_table import TokenTable
from tests.support.triton_device import INTERPRETED

VOCAB_SIZE = 31
TOKENS = st.integers(0, VOCAB_SIZE - 1)


def make_triton_sampler() -> Any:
    pytest.importorskip("triton", reason="triton is not installed")
    if not INTERPRETED:
        pytest.skip("tensors of a CPU need Triton's interpreter")
    from manta.kernels import sample_triton

    return sample_triton.RowSampler()


FORMS: dict[str, Callable[[], Any]] = {"cpu": RowSampler, "torch": lambda: None, "triton": make_triton_sampler}


@st.composite
def fields(draw: st.DrawFn) -> dict[str, Any]:
    """Of SamplingParams, as the oracle reads them."""
    maybe = st.booleans()
    made: dict[str, Any] = {
        "temperature": draw(st.sampled_from([0.0, 0.0, 0.7, 1.0, 1.9])),
        "top_k": draw(st.sampled_from([0, 0, 1, 5, 12])),
        "top_p": draw(st.sampled_from([1.0, 1.0, 0.3, 0.85])),
        "min_p": draw(st.sampled_from([0.0, 0.0, 0.1])),
        "presence_penalty": draw(st.sampled_from([0.0, 0.0, 0.5, -1.0])),
        "frequency_penalty": draw(st.sampled_from([0.0, 0.0, 0.7])),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.0, 1.3, 0.8])),
        "min_tokens": draw(st.integers(0, 8)),
        "stop_token_ids": draw(st.lists(TOKENS, max_size=3, unique=True)),
        "seed": draw(st.integers(0, 2**64 - 1)),
    }
    if draw(maybe):
        made["logit_bias"] = draw(st.dictionaries(TOKENS, st.sampled_from([-100.0, -2.5, 1.0, 4.0]), max_size=6))
    if draw(maybe):
        made["allowed"] = draw(st.lists(TOKENS, min_size=5, max_size=20, unique=True))
    if draw(maybe):
        made["bad_words"] = draw(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), max_size=8))
    return made


def message(asked: dict[str, Any]) -> Sampling:
    own = {name: value for name, value in asked.items() if name not in ("logit_bias", "allowed", "bad_words")}
    bias = asked.get("logit_bias", {})
    return Sampling(
        **own,
        bias_token_ids=np.array(list(bias), "<i4").tobytes(),
        biases=np.array(list(bias.values()), "<f4").tobytes(),
        allowed_token_ids=np.array(asked.get("allowed", []), "<i4").tobytes(),
        bad_words=[np.array(word, "<i4").tobytes() for word in asked.get("bad_words", [])],
    )


def changed(x: np.ndarray[Any, Any], prompt: list[int], output: list[int], asked: dict[str, Any]) -> Any:
    """The logits before temperature, float64 [vocab]."""
    x = x.astype(np.float64)
    for token in range(VOCAB_SIZE):
        if "allowed" in asked and token not in asked["allowed"]:
            x[token] = -np.inf
    for *before, last in asked.get("bad_words", []):
        if len(before) <= len(output) and output[len(output) - len(before) :] == before:
            x[last] = -np.inf
    for token, bias in asked.get("logit_bias", {}).items():
        x[token] += bias
    if len(output) < asked["min_tokens"]:
        x[asked["stop_token_ids"]] = -np.inf
    for token in set(prompt + output):
        x[token] = x[token] / asked["repetition_penalty"] if x[token] > 0 else x[token] * asked["repetition_penalty"]
    for token in set(output):
        x[token] -= asked["frequency_penalty"] * output.count(token) + asked["presence_penalty"]
    return x


def weights_of(x: Any, asked: dict[str, Any]) -> Any:
    """float64 [vocab], 0 for those that may not be drawn."""
    weights = np.exp((x - x.max()) / asked["temperature"])
    kept = weights >= asked["min_p"]
    if asked["top_k"]:
        kept &= weights >= np.sort(weights)[-asked["top_k"]]
    weights = np.where(kept, weights, 0.0)
    if asked["top_p"] < 1:
        descending = np.sort(weights)[::-1]
        above = np.concatenate([[0.0], np.cumsum(descending)[:-1]])
        cutoff = descending[above < asked["top_p"] * weights.sum()][-1]
        weights = np.where(weights >= cutoff, weights, 0.0)
    return weights


def check(token: int, x: Any, asked: dict[str, Any], position: int) -> None:
    """Exactly the oracle's token, unless rounding could make the difference."""
    if not np.isfinite(x.max()):
        return  # nothing is left that may be chosen
    if asked["temperature"] == 0:
        assert x[token] >= x.max() - 1e-5
        return
    near = 1e-4
    loose = weights_of(x, asked | {"top_p": min(asked["top_p"] + near, 1.0), "min_p": asked["min_p"] * (1 - near)})
    assert loose[token] > 0
    weights = weights_of(x, asked)
    draw = uniform(np.array([asked["seed"]], np.uint64), np.array([position]))[0]
    cumulative = np.cumsum(weights)
    target = draw * cumulative[-1]
    low, high = (int(np.searchsorted(cumulative, target * (1 + way * near), side="right")) for way in (-1, 1))
    if (loose > 0).sum() == (weights > 0).sum():
        assert low <= token <= max(high, low)


REQUESTS = st.lists(fields(), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("form", ["cpu", "torch"])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(REQUESTS, SEEDS, st.integers(1, 4))
def test_tokens_are_those_of_the_oracle(form: str, asked: list[dict[str, Any]], seed: int, num_steps: int) -> None:
    run(form, asked, seed, num_steps)


@settings(max_examples=10, deadline=None)  # the interpreter takes a second for each
@given(REQUESTS, SEEDS)
def test_tokens_of_gpu_kernels_are_those_of_the_oracle(asked: list[dict[str, Any]], seed: int) -> None:
    run("triton", asked, seed, 2)


def run(form: str, asked: list[dict[str, Any]], seed: int, num_steps: int) -> None:
    """Steps of some of the rows each, in any order."""
    generator = np.random.default_rng(seed)
    tokens, table = TokenTable(torch.device("cpu")), SamplingTable(VOCAB_SIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "make_row_sampler", lambda _: FORMS[form]())
        sampler = Sampler(table, tokens)
    texts: list[tuple[list[int], list[int]]] = []
    for slot, one in enumerate(asked):
        prompt, output = (generator.integers(0, 6, generator.integers(low, 7)).tolist() for low in (1, 0))
        texts.append((prompt, output))
        tokens.reserve(slot + 1, 20)
        tokens.write(slot, np.array(prompt + output, np.int32))
        table.set(slot, message(one), len(prompt))
    for _ in range(num_steps):
        rows = generator.permutation(len(asked))[: generator.integers(1, len(asked) + 1)]
        positions = np.array([len(texts[slot][0]) + len(texts[slot][1]) for slot in rows])
        logits = (generator.normal(size=(len(rows), VOCAB_SIZE)) * 2).astype(np.float32)
        got = sampler.sample(torch.from_numpy(logits.copy()), rows, positions)
        tokens.put(torch.from_numpy(rows), torch.from_numpy(positions), got)
        for row, (slot, token) in enumerate(zip(rows.tolist(), got.tolist(), strict=True)):
            prompt, output = texts[slot]
            check(token, changed(logits[row], prompt, output, asked[slot]), asked[slot], int(positions[row]))
            output.append(token)


def test_ids_outside_the_vocabulary_are_no_plan() -> None:
    table = SamplingTable(VOCAB_SIZE)
    for name in ("allowed_token_ids", "bias_token_ids"):
        with pytest.raises(PlanError, match=f"slot 3: {name} has an id outside the vocabulary of 31"):
            table.set(3, Sampling(**{name: np.array([VOCAB_SIZE], "<i4").tobytes()}), 1)
    with pytest.raises(PlanError, match="slot 3: bad_words has an id"):
        table.set(3, Sampling(bad_words=[np.array([2, -1], "<i4").tobytes()]), 1)
    with pytest.raises(PlanError, match="slot 3: 0 biases for 1 tokens"):
        table.set(3, Sampling(bias_token_ids=np.array([2], "<i4").tobytes()), 1)


def test_a_slot_that_is_taken_again_asks_for_nothing_of_before() -> None:
    table = SamplingTable(VOCAB_SIZE)
    asking = Sampling(num_logprobs=1, num_prompt_logprobs=0, bad_words=[np.array([2], "<i4").tobytes()])
    for forget in (lambda: table.free(np.array([3])), table.clear, lambda: table.set(3, Sampling(), 1)):
        table.set(3, asking, 1)
        assert set(table.constraints) == set(table.num_logprobs) == set(table.num_prompt_logprobs) == {3}
        forget()
        assert not any((table.constraints, table.num_logprobs, table.num_prompt_logprobs))


@pytest.mark.parametrize("form", ["cpu", "torch"])
@pytest.mark.parametrize(
    ("prompt", "output", "words", "expected"),
    [
        ([5], [], [[5, 7]], 7),  # a word begins in the output
        ([5], [5], [[5, 7]], 9),
        ([1], [4, 5], [[4, 5, 7], [9]], 3),
        ([4], [5], [[4, 5, 7]], 7),
        ([1], [5, 6], [[5, 7], [6, 7]], 9),  # of two words with one end, the second is about to be complete
        ([1], [6, 5], [[5, 7], [6, 7]], 9),
        ([1], [], [[7], [9], [3, 2]], 3),
    ],
)
def test_bad_words(form: str, prompt: list[int], output: list[int], words: list[list[int]], expected: int) -> None:
    """The model wants 7 most, then 9, then 3."""
    tokens, table = TokenTable(torch.device("cpu")), SamplingTable(VOCAB_SIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "make_row_sampler", lambda _: FORMS[form]())
        sampler = Sampler(table, tokens)
    tokens.write(0, np.array(prompt + output, np.int32))
    encoded = [np.array(word, "<i4").tobytes() for word in words]
    table.set(0, Sampling(bad_words=encoded, repetition_penalty=1), len(prompt))
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [7, 9, 3]] = torch.tensor([3.0, 2.0, 1.0])
    assert sampler.sample(logits, np.array([0]), np.array([len(prompt) + len(output)])).tolist() == [expected]
