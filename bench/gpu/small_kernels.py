"""Everything of a step but attention and products: time, and bytes per second as a share of what the device copies."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hardware import Limits
from timing import median_s
from torch import Tensor

from manta.kernels import ops, reference
from manta.kernels.step_tensors import SlotColumns, StepInputs

_HIDDEN, _INTERMEDIATE, _HEADS, _KV_HEADS, _HEAD_DIM, _BLOCK_SIZE = 4096, 14336, 32, 8, 128, 16  # of Llama-3.1-8B
_FILTERS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.5},
}
Case = tuple[str, int, Callable[[], object], Callable[[], object] | None]  # name, bytes, ours, plain torch


def run(device: torch.device, limits: Limits, small: bool) -> Iterator[dict[str, Any]]:
    """One record per kernel and size."""
    for name, num_bytes, ours, theirs in _cases(device, small):
        ours_s = median_s(ours, device)
        record: dict[str, Any] = {"kernel": name, "us": ours_s * 1e6, "gb_per_s": num_bytes / ours_s / 1e9}
        record["share_of_copy"] = num_bytes / ours_s / limits.copy_bytes_per_s
        if theirs is not None:
            record["torch_us"] = median_s(theirs, device) * 1e6
        line = f"{name:>40}: {record['us']:>9.1f} us, {record['share_of_copy']:.0%} of copy"
        print(line + (f"; torch {record['torch_us']:.1f} us" if "torch_us" in record else ""), flush=True)
        yield record


def _cases(device: torch.device, small: bool) -> Iterator[Case]:
    for num_tokens in (4, 16) if small else (1, 64, 256, 8192):
        yield from _layer_cases(num_tokens, device)
    for num_rows in (2, 4) if small else (1, 64, 256, 1024):
        yield _inputs_case(num_rows, device)
        yield from _sample_cases(num_rows, 4096 if small else 128256, device)
    if device.type == "cuda":
        yield _copy_case(device)


def _layer_cases(num_tokens: int, device: torch.device) -> Iterator[Case]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(torch.bfloat16)

    x, residual, weight = random(num_tokens, _HIDDEN), random(num_tokens, _HIDDEN), random(_HIDDEN)
    gate_up = random(num_tokens, 2 * _INTERMEDIATE)
    qkv = random(num_tokens, (_HEADS + 2 * _KV_HEADS) * _HEAD_DIM)
    cos_sin = torch.randn(num_tokens, _HEAD_DIM, device=device)
    keys, values = (random(num_tokens // _BLOCK_SIZE + 1, _KV_HEADS, _BLOCK_SIZE, _HEAD_DIM) for _ in range(2))
    slots = torch.randperm(num_tokens, device=device)
    rope = (qkv, cos_sin, slots, keys, values)
    yield (f"add_rms_norm {num_tokens}", 8 * x.numel(), lambda: ops.add_rms_norm(x, residual, weight, 1e-5),
           lambda: reference.add_rms_norm(x, residual, weight, 1e-5))  # fmt: skip
    yield (
        f"silu_mul {num_tokens}",
        3 * gate_up.numel(),
        lambda: ops.silu_mul(gate_up),
        lambda: reference.silu_mul(gate_up),
    )
    yield (f"rope_kv_write {num_tokens}", 4 * qkv.numel() + 4 * cos_sin.numel(), lambda: ops.rope_kv_write(*rope),
           lambda: reference.rope_kv_write(*rope))  # fmt: skip


def _inputs_case(num_rows: int, device: torch.device) -> Case:
    """Rows that decode at 8,192 tokens, of sequences of up to 32,768."""
    max_blocks = 32768 // _BLOCK_SIZE
    length = torch.full((num_rows,), 8192, dtype=torch.int32, device=device)
    table = torch.ones(num_rows, max_blocks, dtype=torch.int32, device=device)
    columns = SlotColumns(length, length - 1, table, torch.ones(num_rows, 32768, dtype=torch.int32, device=device))
    out = StepInputs.empty(num_rows, num_rows, max_blocks, device)
    slots = torch.arange(num_rows, dtype=torch.int32, device=device)
    query_start = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
    num_bytes = 4 * num_rows * (max_blocks + 512)
    return (
        f"build_inputs {num_rows}", num_bytes,
        lambda: ops.build_inputs(columns, slots, query_start, _BLOCK_SIZE, out), None,
    )  # fmt: skip


def _sample_cases(num_rows: int, vocab_size: int, device: torch.device) -> Iterator[Case]:
    """Logits as peaked as those of models; histories of 2,048 tokens."""
    logits = torch.randn(num_rows, vocab_size, device=device) * 3
    history = torch.randint(0, vocab_size, (num_rows, 2048), dtype=torch.int32, device=device)
    for name, fields in _FILTERS.items():
        ours = _sampler(logits, history, _parameters(num_rows, fields))
        yield (f"sample {num_rows}, {name}", 4 * logits.numel(), ours,
               (lambda: logits.argmax(dim=-1)) if name == "greedy" else None)  # fmt: skip
    tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)
    yield (f"logprobs {num_rows}, 20 best", 8 * logits.numel(), lambda: ops.logprobs(logits, tokens, 20),
           lambda: (logits.log_softmax(dim=-1), logits.topk(20)))  # fmt: skip


def _sampler(logits: Tensor, history: Tensor, columns: Any) -> Callable[[], object]:
    """On a GPU the launches alone: packing the rows' parameters is the host's work."""
    slots, positions = np.arange(logits.shape[0]), np.full(logits.shape[0], history.shape[1])
    if logits.is_cpu:
        sampler = ops.make_row_sampler(logits.device)
        assert sampler is not None
        return lambda: sampler(logits, slots, positions, columns, history)
    from manta.kernels.sample_penalties_triton import MAX_PROGRAMS, make_counts
    from manta.kernels.sample_triton import sample
    from manta.kernels.sampling_rows import SamplingRows

    rows = SamplingRows.of(slots, positions, columns, logits.device)
    has_penalties = bool((columns.repetition_penalty != 1).any())
    counts = make_counts(MAX_PROGRAMS, logits.shape[1], logits.device) if has_penalties else None
    return lambda: sample(logits, rows, history, counts)


def _parameters(num_slots: int, fields: dict[str, float]) -> Any:
    defaults: dict[str, float] = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "presence_penalty": 0.0,
                                  "frequency_penalty": 0.0, "repetition_penalty": 1.0}  # fmt: skip
    columns: dict[str, Any] = {k: np.full(num_slots, fields.get(k, v), np.float32) for k, v in defaults.items()}
    columns |= {k: np.full(num_slots, fields.get(k, 0), np.int64) for k in ("top_k", "num_prompt_tokens", "min_tokens")}
    seed, stops = np.arange(num_slots, dtype=np.uint64), np.full((num_slots, 4), -1, np.int64)
    return SimpleNamespace(**columns, seed=seed, stop_token_ids=stops)


def _copy_case(device: torch.device) -> Case:
    """Eight blocks in 32 layers."""
    shape = (64, _KV_HEADS, _BLOCK_SIZE, _HEAD_DIM)
    kv_cache = [tuple(torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(2)) for _ in range(32)]
    copier = ops.make_block_copier(kv_cache)  # type: ignore[arg-type]
    pairs = torch.arange(16, device=device).view(2, 8)
    pages = [pages for layer in kv_cache for pages in layer]

    def plain() -> None:
        for each in pages:
            each.index_copy_(0, pairs[1], each.index_select(0, pairs[0]))

    return "copy 8 blocks in 32 layers", 2 * 8 * 64 * copier.block_bytes, lambda: copier.copy(pairs), plain
