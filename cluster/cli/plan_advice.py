"""Which flags would make a deployment fit: each is tried, and those that do are told."""

from collections.abc import Iterator
from typing import Any

from manta.cluster.preflight import PreflightError, check_parallel
from manta.configs.memory_plan import plan_memory
from manta.configs.model import ModelSpec
from manta.configs.schema import ServeConfig

_SHORTEST = 2048  # tokens of a context that is worth proposing
_SIZES = (2, 4, 8, 16, 32, 64)
_UTILIZATIONS = (0.9, 0.95)
Change = dict[str, Any]  # fields of ServeConfig


def advice(config: ServeConfig, spec: ModelSpec, device_bytes: int) -> list[str]:
    """Changes of one kind each, such as "--tensor-parallel-size 2"; if none does, the smallest of several together."""
    found = []
    for alternatives in _single(config, spec):
        change = next((each for each in alternatives if _fits(config, spec, device_bytes, each)), None)
        if change is not None:
            found.append(_words(change))
    if found:
        return found
    together = (change for change in _together(config, spec) if _fits(config, spec, device_bytes, change))
    return [_words(change) for change in list(together)[:1]]


def _single(config: ServeConfig, spec: ModelSpec) -> Iterator[list[Change]]:
    """Lists of changes of the same field, the least one first."""
    length = config.max_model_len or 0
    yield [{"max_model_len": length >> shift} for shift in range(1, 12) if length >> shift >= _SHORTEST]
    yield [{"gpu_memory_utilization": each} for each in _UTILIZATIONS if each > config.gpu_memory_utilization]
    if config.kv_cache_dtype == "auto" and config.attention_backend != "flashinfer":
        yield [{"kv_cache_dtype": "fp8"}]
    if _may_quantize(config, spec):
        yield [{"quantization": "fp8"}]
    yield [{"max_num_seqs": config.max_num_seqs >> shift} for shift in (1, 2, 3) if config.max_num_seqs >> shift]
    if config.kv_cache_memory_bytes is not None:
        yield [{"kv_cache_memory_bytes": None}]
    if config.num_gpu_blocks_override is not None:
        yield [{"num_gpu_blocks_override": None}]
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        yield [{name: size} for size in _SIZES if size > getattr(config, name)]


def _together(config: ServeConfig, spec: ModelSpec) -> Iterator[Change]:
    """Splits of more than one kind, fewest GPUs first, 16-bit weights before fp8."""
    tp, pp = config.tensor_parallel_size, config.pipeline_parallel_size
    splits = [(a, b) for a in (1, *_SIZES) for b in (1, *_SIZES) if a >= tp and b >= pp and a * b <= 128]
    for a, b in sorted(splits, key=lambda split: (split[0] * split[1], split[1])):
        change: Change = {"tensor_parallel_size": a} if a > tp else {}
        change |= {"pipeline_parallel_size": b} if b > pp else {}
        yield change
        if _may_quantize(config, spec):
            yield change | {"quantization": "fp8"}


def _may_quantize(config: ServeConfig, spec: ModelSpec) -> bool:
    return config.quantization is None and spec.quantization is None


def _fits(config: ServeConfig, spec: ModelSpec, device_bytes: int, change: Change) -> bool:
    changed = config.model_copy(update=change)
    try:
        check_parallel(changed, spec)
    except PreflightError:
        return False
    return plan_memory(changed, spec, device_bytes).fits


def _words(change: Change) -> str:
    flags = {f"--{name.replace('_', '-')}": value for name, value in change.items()}
    return " ".join(f"{flag} {value}" if value is not None else f"no {flag}" for flag, value in flags.items())
