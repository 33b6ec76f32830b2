"""Random prompts: lengths as asked for, shared where asked for, the same for the same seed."""

from collections import Counter

import numpy as np
import pytest

from manta.cluster.bench.errors import BenchError
from manta.cluster.bench.samples import Sample, fit_to_model, prefix_repetition_samples, random_samples

VOCABULARY = np.arange(100, 400, 3, dtype=np.int32)


def _lists(samples: list[Sample]) -> list[tuple[list[int], int]]:
    return [(sample.token_ids.tolist(), sample.output_len) for sample in samples]


def test_same_seed_same_prompts() -> None:
    first = _lists(random_samples(VOCABULARY, 20, 50, 10, 0.5, 7, seed=3))
    assert _lists(random_samples(VOCABULARY, 20, 50, 10, 0.5, 7, seed=3)) == first
    assert _lists(random_samples(VOCABULARY, 20, 50, 10, 0.5, 7, seed=4)) != first
    repeated = _lists(prefix_repetition_samples(VOCABULARY, 20, 8, 9, 3, 5, seed=3))
    assert _lists(prefix_repetition_samples(VOCABULARY, 20, 8, 9, 3, 5, seed=3)) == repeated


@pytest.mark.parametrize(
    ("input_len", "output_len", "ratio", "inputs", "outputs"),
    [
        (10, 4, 0.0, {10}, {4}),
        (10, 4, 0.25, set(range(7, 14)), {3, 4, 5}),  # floor(7.5) and ceil(12.5)
        (5, 1, 0.9, set(range(11)), {1, 2}),  # an output has at least one token
    ],
)
def test_random_lengths(input_len: int, output_len: int, ratio: float, inputs: set[int], outputs: set[int]) -> None:
    """Every length of the range comes up, and no other; the prefix comes on top."""
    samples = random_samples(VOCABULARY, 600, input_len, output_len, ratio, prefix_len=2)
    assert {len(sample.token_ids) - 2 for sample in samples} == inputs
    assert {sample.output_len for sample in samples} == outputs
    assert len({tuple(sample.token_ids[:2]) for sample in samples}) == 1
    used = {token for sample in samples for token in sample.token_ids.tolist()}
    assert used == set(VOCABULARY.tolist())


def test_random_prompts_share_nothing_but_the_prefix() -> None:
    samples = random_samples(VOCABULARY, 50, 30, 1, prefix_len=16)
    assert len({tuple(sample.token_ids[16:20]) for sample in samples}) == 50


@pytest.mark.parametrize(("num_prompts", "num_prefixes"), [(12, 3), (13, 4), (5, 5), (7, 1)])
def test_prefix_repetition(num_prompts: int, num_prefixes: int) -> None:
    samples = prefix_repetition_samples(VOCABULARY, num_prompts, 20, 11, num_prefixes, 6)
    assert {(len(sample.token_ids), sample.output_len) for sample in samples} == {(31, 6)}
    uses = Counter(tuple(sample.token_ids[:20].tolist()) for sample in samples)
    assert len(uses) == num_prefixes
    assert max(uses.values()) - min(uses.values()) <= 1
    assert len({tuple(sample.token_ids[20:].tolist()) for sample in samples}) == num_prompts


@pytest.mark.parametrize(
    ("call", "flag"),
    [
        (lambda: random_samples(VOCABULARY, 3, 10, 1, 1.0), "--random-range-ratio"),
        (lambda: random_samples(VOCABULARY, 3, 10, 1, -0.1), "--random-range-ratio"),
        (lambda: random_samples(VOCABULARY, 3, 0, 1), "--random-input-len"),
        (lambda: prefix_repetition_samples(VOCABULARY, 3, 1, 1, 4, 1), "--prefix-repetition-num-prefixes"),
        (lambda: prefix_repetition_samples(VOCABULARY, 3, 0, 0, 1, 1), "leave no token"),
    ],
)
def test_impossible_lengths(call: object, flag: str) -> None:
    assert callable(call)
    with pytest.raises(BenchError, match=flag):
        call()


def test_fit_to_model(capsys: pytest.CaptureFixture[str]) -> None:
    samples = [Sample(VOCABULARY[:n], output_len) for n, output_len in ((10, 5), (12, 9), (3, 50), (15, 1))]
    assert fit_to_model(samples[:1], 16, cuts=False) == samples[:1]
    with pytest.raises(BenchError, match="12 input and 9 output tokens does not fit the model's 16"):
        fit_to_model(samples[:2], 16, cuts=False)
    cut = fit_to_model(samples, 16, cuts=True)
    assert [(len(sample.token_ids), sample.output_len) for sample in cut] == [(10, 5), (7, 9), (1, 15), (15, 1)]
    assert cut[1].token_ids.tolist() == VOCABULARY[:7].tolist()
    assert "2 of 4 requests" in capsys.readouterr().out
