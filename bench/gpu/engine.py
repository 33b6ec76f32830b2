"""Whole steps of a model with random weights: seconds, tokens per second, and what the device would allow."""

import random
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hardware import Limits
from inline_engine import InlineEngine, Result
from shapes import make_config

from manta.configs.schema import ServeConfig

_FIRST_TOKEN = 1000
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What the engine is told, and the workloads that are worth their time then; None: all.
_FLAGS: dict[str, tuple[dict[str, Any], tuple[str, ...] | None]] = {
    "plain": ({}, None),
    "eager": ({"enforce_eager": True}, ("single",)),
    "fp8": ({"quantization": "fp8", "kv_cache_dtype": "fp8"}, ("single", "prefill", "1000/1000")),
    "batch-invariant": ({"batch_invariant": True}, ("single", "prefill", "nano-vllm")),
}
MODES, CPU_MODES = tuple(_FLAGS), ("plain", "eager")


@dataclass(frozen=True)
class Workload:
    """Requests that come at once, greedy, without an end but their length."""

    name: str
    prompt_lens: list[int]
    output_lens: list[int]

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Tokens that no other seed gives."""
        tokens = random.Random(seed)
        first = min(_FIRST_TOKEN, vocab_size // 2)
        return [[tokens.randrange(first, vocab_size) for _ in range(length)] for length in self.prompt_lens]


@dataclass(frozen=True)
class ModelCost:
    """What a token costs."""

    layer_weights: int  # that every token is multiplied with
    head_weights: int  # that only tokens that are followed by a sampled one are multiplied with
    weight_bytes: int  # read in a step
    kv_bytes: int  # of a token
    attention_flops: int  # of a token, for each token that it sees
    flops_per_s: float  # of products

    @classmethod
    def of(cls, config: Any, mode: str, limits: Limits) -> "ModelCost":
        is_fp8 = mode == "fp8"
        itemsize = 1 if is_fp8 else 2
        heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        attention = config.hidden_size * (heads + config.num_attention_heads * config.head_dim)
        layers = config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
        head = config.hidden_size * config.vocab_size
        kv_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
        pair_flops = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
        flops_per_s = limits.fp8_matmul_flops if is_fp8 else None
        return cls(layers, head, layers * itemsize + head * 2, kv_bytes, pair_flops, flops_per_s or limits.matmul_flops)

    def least_s_per_token(self, batch: int, prompt: float, output: float, limits: Limits) -> float:
        """Per output token: prefill at the matmul rate, decode at the larger of matmul and weight reads, KV reads."""
        flops_s = 2 * (self.layer_weights + self.head_weights) / self.flops_per_s
        read_s = self.weight_bytes / (batch * limits.copy_bytes_per_s)
        kv_s = (prompt + output / 2) * self.kv_bytes / limits.copy_bytes_per_s
        return prompt / output * 2 * self.layer_weights / self.flops_per_s + max(flops_s, read_s) + kv_s

    def prefill_flops(self, prompt_lens: list[int]) -> float:
        """Of prompts computed as a whole, each followed by one sampled token."""
        pairs = sum(length * (length + 1) // 2 for length in prompt_lens)
        products = 2 * (self.layer_weights * sum(prompt_lens) + self.head_weights * len(prompt_lens))
        return products + self.attention_flops * pairs


def workloads(small: bool) -> list[Workload]:
    """One request; prompts that fill one step; 1000 in and out; 2048 in and 128 out; nano-vllm's 256 requests of 100 to
    1024 in and out. As many requests as have room for all their KV."""
    lengths = random.Random(0)
    if small:
        return [
            Workload("single", [16], [8]),
            Workload("prefill", [30, 30], [1, 1]),
            Workload("mixed", [20, 9, 33], [6, 10, 4]),
        ]
    nano = [(lengths.randint(100, 1024), lengths.randint(100, 1024)) for _ in range(256)]
    return [
        Workload("single", [128], [256]),
        Workload("prefill", [2048] * 8, [1] * 8),
        Workload("1000/1000", [1000] * 384, [1000] * 384),
        Workload("2048/128", [2048] * 384, [128] * 384),
        Workload("nano-vllm", [a for a, _ in nano], [b for _, b in nano]),
    ]


def model_config(shape: str, small: bool) -> Any:
    """transformers' config of the shape."""
    overrides = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 512}
    config = make_config(shape, **(overrides if small else {}))
    config.architectures = [_ARCHITECTURES[config.model_type]]
    return config


@contextmanager
def started(config: Any, mode: str, device: torch.device, small: bool) -> Iterator[InlineEngine]:
    """An engine with random weights of this shape, made on the device."""
    sizes: dict[str, Any] = {"max_num_seqs": 512, "max_num_batched_tokens": 16384, "max_model_len": 4096}
    if small:
        sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 128, "num_gpu_blocks_override": 64}
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(Path(folder))
        flags = {"load_format": "dummy", "dtype": "bfloat16", "device": device.type} | _FLAGS[mode][0]
        with closing(InlineEngine(ServeConfig(model=folder, **flags, **sizes))) as engine:
            print(
                f"ready after {engine.start_s:.1f} s: weights {engine.rank.load_s:.1f} s, trial of the largest steps "
                f"and recordings {engine.rank.profile_s:.1f} s; {engine.rank.num_blocks} KV blocks", flush=True
            )  # fmt: skip
            yield engine


def run(shape: str, mode: str, device: torch.device, limits: Limits, small: bool) -> Iterator[dict[str, Any]]:
    """One record per workload of the mode, with the share of the roofline that `limits` give."""
    config, chosen = model_config(shape, small), _FLAGS[mode][1]
    cost = ModelCost.of(config, mode, limits)
    with started(config, mode, device, small) as engine:
        for seed, workload in enumerate(workloads(small)):
            if chosen is not None and workload.name not in chosen:
                continue
            few = workload.prompts(config.vocab_size, -1 - seed)[:8]
            engine.generate(few, [4] * len(few))
            result = engine.generate(workload.prompts(config.vocab_size, seed), workload.output_lens)
            record = {"shape": shape, "mode": mode, "workload": workload.name}
            record |= _figures(workload, result, cost, limits)
            record |= {"num_kv_blocks": engine.rank.num_blocks, "start_s": engine.start_s}
            print(_line(record), flush=True)
            yield record


def _figures(workload: Workload, result: Result, cost: ModelCost, limits: Limits) -> dict[str, Any]:
    batch, is_prefill = len(workload.prompt_lens), max(workload.output_lens) == 1
    prompt, output = sum(workload.prompt_lens) / batch, sum(workload.output_lens) / batch
    least_s = cost.least_s_per_token(batch, prompt, output, limits)
    figures: dict[str, Any] = {
        "requests": batch,
        "total_s": result.total_s,
        "first_token_s": result.first_token_s,
        "output_tok_s": result.num_output_tokens / result.total_s,
        "total_tok_s": (result.num_output_tokens + sum(workload.prompt_lens)) / result.total_s,
        "roofline_tok_s": 1 / least_s,
        "share_of_roofline": result.num_output_tokens / result.total_s * least_s,
        "num_steps": len(result.device_us),
        "median_step_device_ms": statistics.median(result.device_us) / 1e3,
        "device_idle": result.idle_share,
    }
    if batch == 1 and not is_prefill:
        decode_s = result.total_s - result.first_token_s
        figures["ms_per_token"] = 1e3 * decode_s / (workload.output_lens[0] - 1)
        figures["least_ms_per_token"] = 1e3 * cost.weight_bytes / limits.copy_bytes_per_s
    if is_prefill:
        flops = cost.prefill_flops(workload.prompt_lens)
        device_s = sum(result.device_us) / 1e6
        figures["prefill_mfu"] = flops / result.total_s / cost.flops_per_s
        figures["prefill_mfu_on_device"] = flops / device_s / cost.flops_per_s if device_s else None
    return figures


def _line(record: dict[str, Any]) -> str:
    parts = [
        f"{record['output_tok_s']:,.0f} output tok/s = {record['share_of_roofline']:.0%} of the roofline "
        f"{record['roofline_tok_s']:,.0f}"
    ]
    if "ms_per_token" in record:
        parts.append(f"{record['ms_per_token']:.2f} ms per token (reading weights: {record['least_ms_per_token']:.2f})")
    if "prefill_mfu" in record:
        on_device = record["prefill_mfu_on_device"] or float("nan")
        parts.append(f"{record['prefill_mfu']:.0%} of the matmul rate, on the device {on_device:.0%}")
    parts += [
        f"median step {record['median_step_device_ms']:.2f} ms on the device, idle {record['device_idle']:.1%}",
        f"first token after {record['first_token_s'] * 1e3:.1f} ms",
    ]
    return f"{record['shape']} {record['workload']}, {record['mode']}: {', '.join(parts)}"
