"""Greedy tokens in float32 and the first tokens in bfloat16, beside transformers on the same weights and device."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from inline_engine import InlineEngine
from shapes import make_config
from transformers import AutoModelForCausalLM

from manta.configs.schema import ServeConfig

_OVERRIDES = {"num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1024, "vocab_size": 4096}
_LENGTHS = [3, 17, 64, 130, 200]
_NUM_NEW = 24


def run(device: torch.device) -> list[dict[str, Any]]:
    """Per shape and dtype the share of equal tokens; 1.0 is right in float32, nearly 1 in bfloat16."""
    records = []
    for shape in ("smollm2-135m", "qwen3-0.6b", "llama-3.1-8b"):
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
        for dtype in ("float32", "bfloat16"):
            with tempfile.TemporaryDirectory() as folder:
                share = _equal_share(folder, make_config(shape, **_OVERRIDES, **heads), dtype, device)
            records.append({"shape": shape, "dtype": dtype, "equal_tokens": share})
            print(records[-1], flush=True)
    return records


def _equal_share(folder: str, config: Any, dtype: str, device: torch.device) -> float:
    torch.manual_seed(0)
    build: Any = AutoModelForCausalLM.from_config
    model = build(config, dtype=getattr(torch, dtype)).to(device).eval()
    model.save_pretrained(Path(folder))
    tokens = torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, config.vocab_size, (length,), generator=tokens).tolist() for length in _LENGTHS]
    engine = InlineEngine(
        ServeConfig(
            model=folder,
            dtype=dtype,
            device=device.type,
            max_num_seqs=8,
            max_num_batched_tokens=96,
            max_model_len=256,
            num_gpu_blocks_override=160,
        )
    )
    ours = engine.generate(prompts, [_NUM_NEW] * len(prompts)).tokens
    num_equal = 0
    for prompt, found in zip(prompts, ours, strict=True):
        # Each token by itself, given Manta's own before it: one that differs does not make all later ones differ.
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + found], device=device)).logits[0]
        expected = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        num_equal += sum(a == b for a, b in zip(found, expected, strict=True))
    return num_equal / (_NUM_NEW * len(prompts))
