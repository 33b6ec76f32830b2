"""`manta plan`: whether a deployment fits into its GPUs, and what they will hold, before there are any."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from manta.cluster.cli.flags import Parser, UsageError, parse_serve_config
from manta.cluster.cli.plan_advice import advice
from manta.cluster.preflight import PreflightError, check_parallel, model_folder
from manta.configs.memory_estimate import activation_itemsize, weight_form
from manta.configs.memory_plan import MemoryPlan, RankMemory, gib, plan_memory
from manta.configs.model import ModelError, ModelSpec, read_model_spec
from manta.configs.public_models import public_id, public_models, public_spec
from manta.configs.schema import ServeConfig

_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_EPILOG = "Every flag of `manta serve` may follow, and wins over the file. Exit code 1: it does not fit."


@dataclass(frozen=True, slots=True)
class _Planned:
    """All that is told."""

    config: ServeConfig
    spec: ModelSpec
    source: str  # of the model's shape
    device_bytes: int
    memory: MemoryPlan
    advice: list[str]

    @property
    def num_gpus(self) -> int:
        return self.config.num_ranks * self.config.max_num_replicas

    @property
    def lengths(self) -> list[int]:
        """Typical ones, and the whole context."""
        longest = self.memory.max_model_len
        return [*(length for length in _LENGTHS if length < longest), longest]


def plan(argv: list[str]) -> int:
    """Prints the plan; returns 1 if it does not fit. Raises UsageError."""
    parser = Parser(
        prog="manta plan",
        usage="manta plan CONFIG.yaml|MODEL [--device-memory 80GiB] [--json] [flags of manta serve]",
        description="What a deployment takes of its GPUs' memory, and how many sequences fit, before there are any.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--device-memory", default="80GiB", metavar="BYTES", help="of one GPU (default: 80GiB)")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes and tokens")
    args, words = parser.parse_known_args(argv)
    if not words:
        raise UsageError("name what to plan: manta plan CONFIG.yaml, or manta plan MODEL [flags of manta serve]")
    device_bytes = _device_bytes(args.device_memory)
    config = parse_serve_config(_with_config_flag(words))
    if config.device == "cpu":
        raise UsageError("device is cpu: manta plan counts the memory of GPUs; on a CPU --kv-cache-memory-bytes counts")
    spec, source = _find_model(config)
    try:
        check_parallel(config, spec)
    except PreflightError as error:
        raise UsageError(str(error)) from None
    memory = plan_memory(config, spec, device_bytes)
    planned = _Planned(
        config, spec, source, device_bytes, memory, [] if memory.fits else advice(config, spec, device_bytes)
    )
    print(json.dumps(_as_json(planned), indent=2) if args.json else _as_text(planned))
    return 0 if memory.fits else 1


def _device_bytes(text: str) -> int:
    try:
        num_bytes = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise UsageError(f"--device-memory: give bytes, or a size such as 80GiB, not {text!r}") from None
    if num_bytes < 2**30:
        raise UsageError(f"--device-memory: {text} is less than 1GiB; give a size such as 80GiB")
    return num_bytes


def _with_config_flag(words: list[str]) -> list[str]:
    """The name of a YAML file is one of `manta serve --config`. Raises UsageError where there are several."""
    files = [index for index, word in enumerate(words) if word.endswith((".yaml", ".yml")) and not word.startswith("-")]
    if len(files) > 1:
        raise UsageError(f"{words[files[1]]} is a second file; plan one at a time")
    if not files or words[files[0] - 1 : files[0]] == ["--config"]:
        return words
    return [*words[: files[0]], "--config", *words[files[0] :]]


def _find_model(config: ServeConfig) -> tuple[ModelSpec, str]:
    """The shape, and where it is from. Raises UsageError."""
    folder, known = Path(config.model).expanduser(), public_id(config.model)
    try:
        if folder.is_dir():
            return read_model_spec(folder), str(folder / "config.json")
        if known is not None:
            return public_spec(known), f"published shape of {known}"
        folder = model_folder(config)
        return read_model_spec(folder), f"config.json of {config.model} on the hub"
    except (ModelError, PreflightError) as error:
        known_ones = "" if folder.is_dir() else f"; without it the shapes of {', '.join(public_models())} are known"
        raise UsageError(f"{error}{known_ones}") from None


def _as_text(planned: _Planned) -> str:
    config, memory = planned.config, planned.memory
    lines = [
        f"model        {config.model_name}: {_count(planned.spec.num_weights)} weights ({planned.source})",
        f"deployment   {planned.num_gpus} x {gib(planned.device_bytes)}: replicas {_replicas(config)}, "
        f"pipeline {config.pipeline_parallel_size}, tensor {config.tensor_parallel_size}",
        *_stage_lines(planned),
    ]
    if memory.fits:
        lines += [
            f"KV blocks    {memory.num_blocks} of {memory.block_size} tokens a replica: "
            f"{memory.num_blocks * memory.block_size} tokens",
            f"context      {memory.max_model_len} tokens",
            *_sequence_lines(planned),
        ]
    lines.append("fits         yes" if memory.fits else f"fits         no: {memory.problem}")
    lines += [f"change       {change}" for change in planned.advice]
    lines += [f"note         {note}" for note in _notes(planned)]
    return "\n".join(lines)


def _stage_lines(planned: _Planned) -> list[str]:
    """A line per stage, or one for several that are alike."""
    titles: dict[str, list[int]] = {}
    for stage in planned.memory.stages:
        titles.setdefault(_holds(stage), []).append(stage.pp_rank)
    lines = []
    for text, ranks in titles.items():
        name = f"stage {ranks[0]}" + (f"-{ranks[-1]}" if len(ranks) > 1 else "")
        lines.append(f"{name if len(planned.memory.stages) > 1 else 'each GPU':<13}{text}")
    return lines


def _holds(stage: RankMemory) -> str:
    taken = {
        "weights": stage.weight_bytes,
        "tables": stage.table_bytes,
        "activations": stage.activation_bytes,
        "CUDA and libraries": stage.outside_bytes,
    }
    parts = ", ".join(f"{name} {gib(num_bytes)}" for name, num_bytes in taken.items())
    return f"{gib(stage.allowed_bytes)} may be used: {parts}; left for KV blocks {gib(max(0, stage.left_bytes))}"


def _sequence_lines(planned: _Planned) -> list[str]:
    """How many run at once, over the most replicas there can be."""
    replicas, memory = planned.config.max_num_replicas, planned.memory
    lines = []
    for index, length in enumerate(planned.lengths):
        number = memory.num_sequences(length)
        bound = " (--max-num-seqs)" if number == memory.max_num_seqs else ""
        lines.append(f"{'sequences' if not index else '':<13}{number * replicas} of {length} tokens at once{bound}")
    return lines


def _notes(planned: _Planned) -> list[str]:
    config, spec, memory = planned.config, planned.spec, planned.memory
    notes = []
    if memory.fits and memory.max_model_len < memory.asked_model_len:
        notes.append(
            f"the model's context of {memory.asked_model_len} tokens does not fit and will be {memory.max_model_len}"
        )
    form = weight_form(config, spec)
    if form != "plain" or config.kv_cache_dtype != "auto":
        notes.append("fp8 needs GPUs of compute capability 8.9 or later (H100, H200, L40S, not A100)")
    if form == "online" and config.load_format != "dummy":
        wide = max(stage.weight_bytes for stage in memory.stages) * activation_itemsize(config, spec)
        notes.append(
            f"while it loads, every rank needs up to {gib(wide)} of host memory for weights before they are fp8"
        )
    notes.append("activations are estimated and CUDA and libraries assumed; a worker measures both as it starts")
    return notes


def _as_json(planned: _Planned) -> dict[str, Any]:
    config, memory = planned.config, planned.memory
    return {
        "model": config.model_name,
        "shape_from": planned.source,
        "num_weights": planned.spec.num_weights,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "min_replicas": config.min_num_replicas,
        "max_replicas": config.max_num_replicas,
        "num_gpus": planned.num_gpus,
        "device_bytes": planned.device_bytes,
        "stages": [
            {
                "stage": stage.pp_rank,
                "num_layers": stage.num_layers,
                "allowed_bytes": stage.allowed_bytes,
                "weight_bytes": stage.weight_bytes,
                "table_bytes": stage.table_bytes,
                "activation_bytes_estimated": stage.activation_bytes,
                "outside_bytes_assumed": stage.outside_bytes,
                "kv_bytes": max(0, stage.left_bytes),
                "bytes_per_block": stage.kv.block_bytes,
                "num_blocks": stage.num_blocks,
            }
            for stage in memory.stages
        ],
        "block_size": memory.block_size,
        "num_blocks": memory.num_blocks,
        "max_model_len": memory.max_model_len,
        "max_num_seqs": memory.max_num_seqs,
        "sequences_per_replica": {str(n): memory.num_sequences(n) for n in planned.lengths} if memory.fits else {},
        "fits": memory.fits,
        "problem": memory.problem,
        "advice": planned.advice,
        "notes": _notes(planned),
    }


def _replicas(config: ServeConfig) -> str:
    lowest, highest = config.min_num_replicas, config.max_num_replicas
    return str(highest) if lowest == highest else f"{lowest} to {highest}"


def _count(number: int) -> str:
    return f"{number / 1e9:.1f} billion" if number >= 1e9 else f"{number / 1e6:.0f} million"
