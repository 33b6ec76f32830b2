"""Requests from a ShareGPT file: the first message of each conversation as prompt, the second for the output length."""

import json
from pathlib import Path

import numpy as np

from manta.cluster.bench.errors import BenchError
from manta.cluster.bench.samples import Sample
from manta.cluster.bench.vocabulary import PromptTokenizer

# What vLLM's benchmark leaves out, so that figures compare.
MIN_LEN = 4
MAX_PROMPT_LEN = 1024
MAX_TOTAL_LEN = 2048


def sharegpt_samples(
    path: Path, tokenizer: PromptTokenizer, num_prompts: int, output_len: int | None = None, seed: int = 0
) -> list[Sample]:
    """In an order that `seed` decides; again from the start where the file has too few.

    Left out: prompts under 4 or over 1,024 tokens, outputs under 4 (unless `output_len` sets them) and both together
    over 2,048. Raises BenchError.
    """
    pairs = _read_pairs(path)
    samples: list[Sample] = []
    for index in np.random.default_rng(seed).permutation(len(pairs)):
        prompt, answer = pairs[index]
        ids = tokenizer.encode(prompt, add_special_tokens=True)
        length = output_len or len(tokenizer.encode(answer, add_special_tokens=True))
        fits = MIN_LEN <= len(ids) <= MAX_PROMPT_LEN and len(ids) + length <= MAX_TOTAL_LEN
        if fits and (output_len or length >= MIN_LEN):
            samples.append(Sample(np.array(ids, np.int32), length, prompt))
            if len(samples) == num_prompts:
                return samples
    if not samples:
        raise BenchError(f"--dataset-path {path} holds no conversation of a usable length")
    return [samples[index % len(samples)] for index in range(num_prompts)]


def _read_pairs(path: Path) -> list[tuple[str, str]]:
    """(first message, second message) of every conversation that has both."""
    try:
        entries = json.loads(path.read_bytes())
    except OSError as error:
        raise BenchError(f"cannot read --dataset-path {path}: {error.strerror}") from None
    except ValueError as error:
        raise BenchError(f"--dataset-path {path} is not valid JSON: {error}") from None
    try:
        if not isinstance(entries, list):
            raise TypeError
        turns = [entry["conversations"] for entry in entries if "conversations" in entry]
        return [(str(turn[0]["value"]), str(turn[1]["value"])) for turn in turns if len(turn) >= 2]
    except (TypeError, KeyError):
        raise BenchError(
            f"--dataset-path {path} is no ShareGPT file: a list of {{conversations: [{{value}}, {{value}}, ..]}}"
        ) from None
