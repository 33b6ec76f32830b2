"""The engine's flags for benchmarks without a server: those fields of ServeConfig that concern the engine."""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import numpy as np
from pydantic import ValidationError

from manta.cluster.bench.dataset_flags import COUNT, add_flag
from manta.cluster.bench.errors import BenchError
from manta.cluster.bench.vocabulary import PromptTokenizer, load_prompt_tokenizer
from manta.cluster.cli.flags import build_config
from manta.cluster.doors.text import TokenizerError
from manta.cluster.engine.bringup import BringUpError
from manta.cluster.engine.workers import WorkerError
from manta.cluster.launch.launcher import LaunchError
from manta.cluster.llm import LLM
from manta.cluster.preflight import PreflightError, read_model
from manta.configs.sampling import SamplingParams
from manta.configs.schema import ServeConfig

_GROUPS = ("Model", "Parallelism", "KV cache", "Scheduler")
_LEFT_OUT = {"model", "served_model_name", "chat_template", "distributed_executor_backend", "ray_address", "seed"}


def add_run_flags(group: Any) -> None:
    """What both benchmarks without a server take, besides their lengths."""
    add_flag(group, "--n", "completions per prompt", 1, type=COUNT, metavar="N")
    add_flag(group, "--temperature", "0 is greedy", 1.0, type=float, metavar="X")
    add_flag(group, "--disable-detokenize", "make no text of the tokens", action="store_true")
    add_flag(group, "--disable-tqdm", "no progress bar", action="store_true")
    add_flag(group, "--output-json", "write the figures to a file", metavar="FILE")


def sampling_of(args: argparse.Namespace, output_len: int) -> SamplingParams:
    """Exactly `output_len` tokens, as the run flags ask for. Raises BenchError."""
    fields = {"n": args.n, "temperature": args.temperature, "ignore_eos": True, "max_tokens": output_len}
    try:
        return SamplingParams.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BenchError(f"--{first['loc'][0]}: {first['msg']}, not {first['input']!r}") from None


def add_engine_flags(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """`--model` and one flag per field, grouped as in `manta serve --help`; `defaults` replace those of ServeConfig."""
    groups = {title: parser.add_argument_group(title) for title in _GROUPS}
    groups["Model"].add_argument("--model", required=True, metavar="MODEL", help="local Hugging Face folder or hub id")
    for name, field in ServeConfig.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        if extra["group"] not in groups or name in _LEFT_OUT:
            continue
        default = defaults.get(name, field.default)
        if isinstance(default, bool):
            default = "on" if default else "off"
        help = (field.description or "") + ("" if default is None else f" (default: {default})")
        flags = [f"--{name.replace('_', '-')}", *([f"-{extra['short']}"] if extra.get("short") else [])]
        action: dict[str, Any] = {"metavar": "X"}
        if field.annotation is bool:
            action = {"action": argparse.BooleanOptionalAction}
        elif choices := _choices(field.annotation):
            action = {"choices": choices}
        groups[str(extra["group"])].add_argument(*flags, dest=name, default=defaults.get(name), help=help, **action)


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that were set, checked by ServeConfig. Raises UsageError."""
    names = {name for name in ServeConfig.model_fields if getattr(args, name, None) is not None}
    settings = {name: getattr(args, name) for name in names}
    build_config(settings)
    return settings


@dataclass(frozen=True)
class ModelPrompts:
    """What prompts for a model may be: token ids (int32), from its tokenizer where it has one, and tokens at most."""

    ids: np.ndarray
    tokenizer: PromptTokenizer | None
    max_model_len: int


def model_prompts(settings: dict[str, Any]) -> ModelPrompts:
    """Read from the model's folder, before anything is started. Raises BenchError."""
    try:
        facts = read_model(ServeConfig.model_validate(settings))
    except PreflightError as error:
        raise BenchError(str(error)) from None
    max_model_len = int(settings.get("max_model_len") or facts.spec.max_position)
    name = settings.get("tokenizer") or str(facts.folder)
    if "tokenizer" not in settings and not (facts.folder / "tokenizer.json").is_file():
        return ModelPrompts(np.arange(facts.spec.vocab_size, dtype=np.int32), None, max_model_len)
    tokenizer = load_prompt_tokenizer(name, bool(settings.get("trust_remote_code")))
    ids = tokenizer.plain_ids()
    return ModelPrompts(ids[ids < facts.spec.vocab_size], tokenizer, max_model_len)


def check_json(path: str | None) -> None:
    """Raises BenchError for a file that could not be written after the run."""
    if path and not Path(path).expanduser().absolute().parent.is_dir():
        raise BenchError(f"--output-json {path}: there is no folder {Path(path).parent}")


def write_json(path: str, figures: dict[str, Any]) -> None:
    """Raises BenchError."""
    try:
        Path(path).expanduser().write_text(json.dumps(figures, indent=4) + "\n", encoding="utf-8")
    except OSError as error:
        raise BenchError(f"cannot write --output-json {path}: {error.strerror}") from None
    print(f"Figures written to {path}")


@contextmanager
def open_engine(settings: dict[str, Any], with_text: bool) -> Iterator[LLM]:
    """The engine in this process until the block ends; without text if not `with_text`. Raises BenchError."""
    start_s = time.perf_counter()
    try:
        llm = LLM(**settings, skip_tokenizer_init=not with_text)
    except (PreflightError, LaunchError, BringUpError, WorkerError, TokenizerError) as error:
        raise BenchError(str(error)) from None
    with llm:
        print(f"Engine ready after {time.perf_counter() - start_s:.1f} s", flush=True)
        yield llm


def _choices(annotation: Any) -> list[str]:
    """Of a Literal, also when it may be None."""
    if isinstance(annotation, UnionType):
        return [choice for part in get_args(annotation) for choice in _choices(part)]
    return list(get_args(annotation)) if get_origin(annotation) is Literal else []
