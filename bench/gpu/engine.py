"""Whole steps of a model with random weights: seconds, tokens per second, and what the device would allow."""

import random
import tempfile
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

    num_weights: int  # that a token is multiplied with
    weight_bytes: int  # read in a step
    kv_bytes: int  # of a token

    @classmethod
    def of(cls, config: Any, itemsize: int) -> "ModelCost":
        heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        attention = config.hidden_size * (heads + config.num_attention_heads * config.head_dim)
        layer = attention + 3 * config.hidden_size * config.intermediate_size
        num_weights = config.num_hidden_layers * layer + config.hidden_size * config.vocab_size
        kv_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
        return cls(num_weights, num_weights * itemsize, kv_bytes)

    def least_s_per_token(self, batch: int, prompt: float, output: float, limits: Limits) -> float:
        """Per output token: prefill at the matmul rate, decode at the larger of matmul and weight reads, KV reads."""
        flops_s = 2 * self.num_weights / limits.matmul_flops
        read_s = self.weight_bytes / (batch * limits.copy_bytes_per_s)
        kv_s = (prompt + output / 2) * self.kv_bytes / limits.copy_bytes_per_s
        return prompt / output * flops_s + max(flops_s, read_s) + kv_s


def workloads(small: bool) -> list[Workload]:
    """single; 1000 in and out; 2048 in and 128 out; nano-vllm's 256 requests of 100 to 1024 in and out."""
    lengths = random.Random(0)
    if small:
        return [Workload("single", [16], [8]), Workload("mixed", [20, 9, 33], [6, 10, 4])]
    nano = [(lengths.randint(100, 1024), lengths.randint(100, 1024)) for _ in range(256)]
    return [
        Workload("single", [128], [256]),
        Workload("1000/1000", [1000] * 512, [1000] * 512),
        Workload("2048/128", [2048] * 512, [128] * 512),
        Workload("nano-vllm", [a for a, _ in nano], [b for _, b in nano]),
    ]


def serve_config(
    folder: str, device: torch.device, *, eager: bool, small: bool, batch_invariant: bool = False
) -> ServeConfig:
    sizes: dict[str, Any] = {"max_num_seqs": 512, "max_num_batched_tokens": 16384, "max_model_len": 4096}
    if small:
        sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 128, "num_gpu_blocks_override": 64}
    return ServeConfig(
        model=folder, load_format="dummy", dtype="bfloat16", device=device.type, enforce_eager=eager,
        batch_invariant=batch_invariant, **sizes,
    )  # fmt: skip


def run(
    shape: str, device: torch.device, limits: Limits, small: bool, eager: bool = False, batch_invariant: bool = False
) -> list[dict[str, Any]]:
    """One record per workload, with the share of the roofline that `limits` give; eager: of single requests alone,
    batch_invariant: of the first and the last workload."""
    overrides = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 512}
    config = make_config(shape, **(overrides if small else {}))
    with tempfile.TemporaryDirectory() as folder:
        config.architectures = [_ARCHITECTURES[config.model_type]]
        config.save_pretrained(Path(folder))
        engine = InlineEngine(serve_config(folder, device, eager=eager, small=small, batch_invariant=batch_invariant))
        records = []
        for workload in workloads(small):
            if (eager or (batch_invariant and workload.name != "nano-vllm")) and workload.name != "single":
                continue
            seed = len(records)
            engine.generate(workload.prompts(config.vocab_size, -1 - seed)[:8], [4] * len(workload.prompt_lens[:8]))
            result = engine.generate(workload.prompts(config.vocab_size, seed), workload.output_lens)
            records.append(_record(shape, workload, result, ModelCost.of(config, 2), limits, engine, eager))
            records[-1]["batch_invariant"] = batch_invariant
            print(_line(records[-1]), flush=True)
    return records


def _record(
    shape: str,
    workload: Workload,
    result: Result,
    cost: ModelCost,
    limits: Limits,
    engine: InlineEngine,
    eager: bool,
) -> dict[str, Any]:
    batch = len(workload.prompt_lens)
    prompt, output = sum(workload.prompt_lens) / batch, sum(workload.output_lens) / batch
    least_s = cost.least_s_per_token(batch, prompt, output, limits)
    decode_s = result.total_s - result.first_token_s
    return {
        "shape": shape,
        "workload": workload.name,
        "graphs": not eager,
        "total_s": result.total_s,
        "first_token_s": result.first_token_s,
        "output_tok_s": result.num_output_tokens / result.total_s,
        "roofline_tok_s": 1 / least_s,
        "share_of_roofline": result.num_output_tokens / result.total_s * least_s,
        "ms_per_token": 1e3 * decode_s / max(1, workload.output_lens[0] - 1) if batch == 1 else None,
        "least_ms_per_token": 1e3 * least_s if batch == 1 else None,
        "prefill_mfu": 2 * cost.num_weights * workload.prompt_lens[0] / result.first_token_s / limits.matmul_flops,
        "device_idle": result.idle_share,
        "num_kv_blocks": engine.rank.num_blocks,
        "start_s": engine.start_s,
    }


def _line(record: dict[str, Any]) -> str:
    step = "" if record["ms_per_token"] is None else f", {record['ms_per_token']:.2f} ms per token"
    return (
        f"{record['shape']} {record['workload']}{'' if record['graphs'] else ' (eager)'}"
        f"{' (batch-invariant)' if record['batch_invariant'] else ''}: "
        f"{record['output_tok_s']:,.0f} output tok/s = {record['share_of_roofline']:.0%} of the roofline "
        f"{record['roofline_tok_s']:,.0f}{step}, device idle {record['device_idle']:.1%}, "
        f"first token after {record['first_token_s'] * 1e3:.1f} ms"
    )
