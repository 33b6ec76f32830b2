"""The flags that say what is sent, with vLLM's names, and the requests they ask for."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from manta.cluster.bench.errors import BenchError
from manta.cluster.bench.samples import Sample, prefix_repetition_samples, random_samples
from manta.cluster.bench.sharegpt import sharegpt_samples
from manta.cluster.bench.trace import TraceShape, trace_samples
from manta.cluster.bench.vocabulary import PromptTokenizer

DATASETS = ("random", "sharegpt", "prefix-repetition", "trace")
_NEED_PATH = ("sharegpt", "trace")


def number(kind: type[int] | type[float], least: float, *, above: bool = False) -> Any:
    """An argparse type: a number of at least `least`, or greater."""

    def parse(text: str) -> Any:
        value = kind(text)
        if value != value or value < least or (above and value == least):
            raise argparse.ArgumentTypeError(f"must be {'above' if above else 'at least'} {least:g}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it: invalid int value
    return parse


COUNT, LENGTH = number(int, 1), number(int, 0)


def add_flag(group: Any, name: str, help: str, default: Any = None, **options: Any) -> None:
    """Adds a flag to an argparse group; its help ends with the default, where there is one."""
    if default not in (None, [], {}):
        help = f"{help} (default: {default:g})" if isinstance(default, float) else f"{help} (default: {default})"
    group.add_argument(name, help=help.lstrip(), default=default, **options)


def add_dataset_flags(parser: argparse.ArgumentParser) -> None:
    """What every benchmark with a dataset takes."""
    group = parser.add_argument_group("Dataset")
    kebab = {"type": lambda name: name.replace("_", "-"), "choices": DATASETS}
    add_flag(group, "--dataset-name", "what is sent", "random", **kebab)
    add_flag(group, "--dataset-path", "ShareGPT JSON, Azure CSV or Mooncake JSON lines", metavar="FILE")
    add_flag(group, "--num-prompts", "requests", 1000, type=COUNT, metavar="N")
    add_flag(group, "--input-len", "same as --random-input-len", type=COUNT, metavar="N")
    lengths = "output length of the random, sharegpt and prefix-repetition datasets, before their own flags"
    add_flag(group, "--output-len", lengths, type=COUNT, metavar="N")
    add_flag(group, "--seed", "same seed, same requests", 0, type=LENGTH, metavar="N")

    group = parser.add_argument_group("Random dataset")
    add_flag(group, "--random-input-len", "tokens", 1024, type=LENGTH, metavar="N")
    add_flag(group, "--random-output-len", "tokens", 128, type=COUNT, metavar="N")
    ratio = "lengths are uniform in [len * (1 - X), len * (1 + X)]"
    add_flag(group, "--random-range-ratio", ratio, 0.0, type=float, metavar="X")
    prefix = "tokens that all prompts begin with, on top of the input length"
    add_flag(group, "--random-prefix-len", prefix, 0, type=LENGTH, metavar="N")

    group = parser.add_argument_group("ShareGPT dataset")
    add_flag(group, "--sharegpt-output-len", "instead of the length of the answers", type=COUNT, metavar="N")

    group = parser.add_argument_group("Prefix repetition dataset")
    add_flag(group, "--prefix-repetition-prefix-len", "tokens of a prefix", 256, type=LENGTH, metavar="N")
    suffix = "tokens after it, different in every request"
    add_flag(group, "--prefix-repetition-suffix-len", suffix, 256, type=LENGTH, metavar="N")
    add_flag(group, "--prefix-repetition-num-prefixes", "different prefixes", 10, type=COUNT, metavar="N")
    add_flag(group, "--prefix-repetition-output-len", "tokens", 128, type=COUNT, metavar="N")

    group = parser.add_argument_group("Trace dataset")
    time = "multiplies the time between requests: 0.5 is twice the recorded rate"
    add_flag(group, "--trace-time-scale", time, 1.0, type=number(float, 0), metavar="X")
    length = "multiplies input, output and shared lengths"
    add_flag(group, "--trace-length-scale", length, 1.0, type=number(float, 0, above=True), metavar="X")
    add_flag(group, "--trace-max-input-len", "cuts longer prompts", type=COUNT, metavar="N")
    add_flag(group, "--trace-max-output-len", "cuts longer outputs", type=COUNT, metavar="N")


def check_dataset_flags(args: argparse.Namespace) -> None:
    """What can be wrong before anything is loaded. Raises BenchError."""
    if args.dataset_name in _NEED_PATH and not args.dataset_path:
        raise BenchError(f"--dataset-name {args.dataset_name} needs a file: --dataset-path FILE")
    if args.dataset_name not in _NEED_PATH and args.dataset_path:
        raise BenchError(
            f"--dataset-name {args.dataset_name} takes no --dataset-path; those for a file are {', '.join(_NEED_PATH)}"
        )
    if args.dataset_path and not Path(args.dataset_path).expanduser().is_file():
        raise BenchError(f"--dataset-path {args.dataset_path} is no file")


def make_samples(args: argparse.Namespace, vocabulary: np.ndarray, tokenizer: PromptTokenizer | None) -> list[Sample]:
    """`--num-prompts` requests, or as many as a trace has; in the order of sending. Raises BenchError."""
    if args.dataset_name == "prefix-repetition":
        return prefix_repetition_samples(
            vocabulary,
            args.num_prompts,
            args.prefix_repetition_prefix_len,
            args.prefix_repetition_suffix_len,
            args.prefix_repetition_num_prefixes,
            args.output_len or args.prefix_repetition_output_len,
            args.seed,
        )
    if args.dataset_name == "random":
        return random_samples(
            vocabulary,
            args.num_prompts,
            args.input_len or args.random_input_len,
            args.output_len or args.random_output_len,
            args.random_range_ratio,
            args.random_prefix_len,
            args.seed,
        )
    path = Path(args.dataset_path).expanduser()
    if args.dataset_name == "trace":
        shape = TraceShape(
            args.trace_time_scale, args.trace_length_scale, args.trace_max_input_len, args.trace_max_output_len
        )
        return trace_samples(path, vocabulary, args.num_prompts, shape, args.seed)
    if tokenizer is None:
        raise BenchError("--dataset-name sharegpt needs a tokenizer for its lengths: --tokenizer FOLDER")
    return sharegpt_samples(path, tokenizer, args.num_prompts, args.output_len or args.sharegpt_output_len, args.seed)
