"""Tiny random checkpoints of every model family, written by transformers itself."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

# Sizes that divide nothing: what only works for round numbers fails here.
_ODD: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# family -> model_type of transformers and what it differs in
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 6}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 20}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama3.1": ("llama", {"rope_parameters": _LLAMA3_ROPE, "head_dim": 16}),
    "vicuna": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": 7, "head_dim": 20}),
    "mistral-full": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 20}),
    "qwen3-tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


def make_checkpoint(
    folder: Path, family: str, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "50GB", **overrides: Any
) -> Path:
    """Writes a random checkpoint of `family` to `folder` and returns the folder. `overrides` are fields of its config.

    Biases and norm weights are random too, and matrices large enough that greedy tokens vary. A small `max_shard_size`
    such as "20KB" splits the weights over several files.
    """
    make_model(family, dtype=dtype, **overrides).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def make_model(family: str, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """The model that `make_checkpoint` writes; equal arguments give equal weights."""
    model_type, fields = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **{**_ODD, **fields, **overrides})
    torch.manual_seed(7)
    build: Any = AutoModelForCausalLM.from_config
    model: PreTrainedModel = build(config, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0.0, 0.3)
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    model.train(False)
    return model
