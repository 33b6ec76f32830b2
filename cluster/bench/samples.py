"""Requests to measure with: what is common to all of them, and those made of random tokens."""

import math
from dataclasses import dataclass, replace

import numpy as np

from manta.cluster.bench.errors import BenchError

_WARM_UP_STREAM = 1  # of the random numbers of a seed


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: a prompt and how many tokens to generate. `arrival_s` is given by traces only, from 0."""

    token_ids: np.ndarray  # int32 [num_tokens]
    output_len: int
    text: str | None = None  # where the prompt is a text; token_ids are then what a tokenizer reads in it
    arrival_s: float | None = None


def random_samples(
    vocabulary: np.ndarray,
    num_prompts: int,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
    seed: int = 0,
) -> list[Sample]:
    """Independent random prompts behind one random prefix of `prefix_len` tokens.

    Lengths are uniform integers in [floor(len * (1 - range_ratio)), ceil(len * (1 + range_ratio))], outputs at least 1;
    the prefix comes on top. Raises BenchError.
    """
    if not 0 <= range_ratio < 1:
        raise BenchError(f"--random-range-ratio must be at least 0 and below 1, not {range_ratio}")
    input_low, input_high = _range(input_len, range_ratio)
    if prefix_len + input_low < 1:
        raise BenchError("--random-input-len is too small: with --random-range-ratio a prompt could have no token")
    rng = np.random.default_rng(seed)
    input_lens = rng.integers(input_low, input_high, num_prompts, endpoint=True)
    output_low, output_high = _range(output_len, range_ratio)
    output_lens = rng.integers(max(1, output_low), max(1, output_high), num_prompts, endpoint=True)
    prefix = rng.choice(vocabulary, prefix_len)
    return [
        Sample(np.concatenate([prefix, rng.choice(vocabulary, length)]), int(output))
        for length, output in zip(input_lens.tolist(), output_lens.tolist(), strict=True)
    ]


def prefix_repetition_samples(
    vocabulary: np.ndarray,
    num_prompts: int,
    prefix_len: int,
    suffix_len: int,
    num_prefixes: int,
    output_len: int,
    seed: int = 0,
) -> list[Sample]:
    """`num_prefixes` random prefixes, each before an equal share (give or take one) of random suffixes, shuffled.

    Raises BenchError.
    """
    if not 1 <= num_prefixes <= num_prompts:
        raise BenchError(
            f"--prefix-repetition-num-prefixes must be from 1 to --num-prompts {num_prompts}, not {num_prefixes}"
        )
    if prefix_len + suffix_len < 1:
        raise BenchError("--prefix-repetition-prefix-len and --prefix-repetition-suffix-len leave no token")
    rng = np.random.default_rng(seed)
    prefixes = rng.choice(vocabulary, (num_prefixes, prefix_len))
    samples = [
        Sample(np.concatenate([prefixes[index % num_prefixes], rng.choice(vocabulary, suffix_len)]), output_len)
        for index in range(num_prompts)
    ]
    return [samples[index] for index in rng.permutation(num_prompts)]


def warm_up_samples(samples: list[Sample], vocabulary: np.ndarray, num: int, seed: int) -> list[Sample]:
    """`num` random prompts as long as the first samples; none of the samples may come to lie in a prefix cache."""
    rng = np.random.default_rng([seed, _WARM_UP_STREAM])
    likes = [samples[index % len(samples)] for index in range(num)]
    return [Sample(rng.choice(vocabulary, len(like.token_ids)), like.output_len) for like in likes]


def fit_to_model(samples: list[Sample], max_model_len: int, cuts: bool) -> list[Sample]:
    """The samples, each with prompt and output within `max_model_len`. Raises BenchError.

    `cuts` shortens what is longer, the prompt first, and says so: a trace was recorded with another model. Otherwise
    every length was asked for, and one that does not fit is a mistake.
    """
    too_long = [s for s in samples if len(s.token_ids) + s.output_len > max_model_len]
    if not too_long:
        return samples
    if not cuts:
        longest = max(too_long, key=lambda sample: len(sample.token_ids) + sample.output_len)
        raise BenchError(
            f"a request of {len(longest.token_ids)} input and {longest.output_len} output tokens does not fit the "
            f"model's {max_model_len}; ask for shorter ones"
        )
    print(f"{len(too_long)} of {len(samples)} requests are cut to the model's {max_model_len} tokens")
    return [_cut(sample, max_model_len) for sample in samples]


def _cut(sample: Sample, max_model_len: int) -> Sample:
    output_len = min(sample.output_len, max_model_len - 1)
    return replace(sample, token_ids=sample.token_ids[: max_model_len - output_len], output_len=output_len)


def _range(length: int, ratio: float) -> tuple[int, int]:
    return math.floor(length * (1 - ratio)), math.ceil(length * (1 + ratio))
