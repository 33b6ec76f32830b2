"""Greedy tokens and logits beside transformers, on the same weights and device."""

import copy
import tempfile
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from inline_engine import InlineEngine
from report import Unit
from shapes import make_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from manta.configs.schema import ServeConfig
from manta.kernels.metadata import AttentionMetadata
from manta.workers.models.decoder import allocate_kv_cache
from manta.workers.rank import LoadedRank

_OVERRIDES = {"num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1024, "vocab_size": 4096}
_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
_LENGTHS = [3, 17, 64, 130, 200]
_NUM_NEW = 24


def units(device: torch.device) -> Iterator[Unit]:
    """One per shape and dtype."""
    for shape in ("smollm2-135m", "qwen3-0.6b", "llama-3.1-8b"):
        for dtype in ("float32", "bfloat16"):
            yield f"{shape}, {dtype}", partial(run, shape, dtype, device)


def run(shape: str, dtype: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """The share of equal tokens: 1.0 is right in float32, nearly 1 in bfloat16; and the relative error of logits of a
    prompt against transformers in float32, beside that of transformers in this dtype."""
    config = make_config(shape, **_OVERRIDES, **_HEADS)
    torch.manual_seed(0)
    build: Any = AutoModelForCausalLM.from_config
    model = build(config, dtype=getattr(torch, dtype)).to(device).eval()
    tokens = torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, config.vocab_size, (length,), generator=tokens).tolist() for length in _LENGTHS]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder))
        with closing(InlineEngine(_config(folder, dtype, device))) as engine:
            found = engine.generate(prompts, [_NUM_NEW] * len(prompts)).tokens
            ours = _logits(engine.rank, prompts[-1], device)
    record = {"shape": shape, "dtype": dtype, "equal_tokens": _equal_share(model, prompts, found, device)}
    with torch.inference_mode():
        ids = torch.tensor([prompts[-1]], device=device)
        theirs, exact = model(ids).logits[0].float(), copy.deepcopy(model).float()(ids).logits[0]
    record |= {"logits_error": _error(ours, exact), "transformers_logits_error": _error(theirs, exact)}
    print(record, flush=True)
    yield record


def _config(folder: str, dtype: Any, device: Any) -> ServeConfig:
    return ServeConfig(
        model=folder, dtype=dtype, device=device.type, max_num_seqs=8, max_num_batched_tokens=96, max_model_len=256,
        num_gpu_blocks_override=160,
    )  # fmt: skip


def _logits(rank: LoadedRank, prompt: list[int], device: torch.device) -> Tensor:
    """float32 [tokens, vocab] of a prompt computed in one step."""
    num_tokens, block_size = len(prompt), rank.config.block_size
    num_blocks = -(-num_tokens // block_size)
    kv_cache = allocate_kv_cache(rank.model, num_blocks, block_size, rank.model.format.kv_dtype, device)
    metadata = AttentionMetadata(
        query_start=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32, device=device),
        block_tables=torch.arange(num_blocks, dtype=torch.int32, device=device)[None, :],
        slot_mapping=torch.arange(num_tokens, device=device),
        positions=torch.arange(num_tokens, device=device),
        num_decodes=0, max_query_len=num_tokens, max_seq_len=num_tokens, block_size=block_size,
    )  # fmt: skip
    return rank.model.logits(rank.model(torch.tensor(prompt, device=device), metadata, kv_cache)).clone()


def _equal_share(model: Any, prompts: list[list[int]], found: list[list[int]], device: torch.device) -> float:
    num_equal = 0
    for prompt, tokens in zip(prompts, found, strict=True):
        # Each token by itself, given Manta's own before it: one that differs does not make all later ones differ.
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens], device=device)).logits[0]
        expected = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        num_equal += sum(a == b for a, b in zip(tokens, expected, strict=True))
    return num_equal / (_NUM_NEW * len(prompts))


def _error(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).norm() / exact.norm())
