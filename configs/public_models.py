"""Shapes of well-known models, for planning without a checkpoint.

Each is the config.json that its publisher has on the Hugging Face hub under the id it stands here with, left out what
Manta does not read (https://huggingface.co/ID/blob/main/config.json).
"""

from typing import Any

from manta.configs.model import ModelSpec, parse_model_spec

_LLAMA_3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
_LLAMA_3_SMALL = _LLAMA_3 | {"tie_word_embeddings": True, "rope_scaling": _LLAMA_3["rope_scaling"] | {"factor": 32.0}}
_QWEN_3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "head_dim": 128,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
_QWEN_2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
_MISTRAL_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 32768,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
# id: what its family has in common, then layers, hidden and intermediate size, attention heads, KV heads
_SHAPES: dict[str, tuple[dict[str, Any], int, int, int, int, int]] = {
    "meta-llama/Llama-3.1-8B": (_LLAMA_3, 32, 4096, 14336, 32, 8),
    "meta-llama/Llama-3.1-70B": (_LLAMA_3, 80, 8192, 28672, 64, 8),
    "meta-llama/Llama-3.1-405B": (_LLAMA_3, 126, 16384, 53248, 128, 8),
    "meta-llama/Llama-3.2-1B": (_LLAMA_3_SMALL | {"head_dim": 64}, 16, 2048, 8192, 32, 8),
    "meta-llama/Llama-3.2-3B": (_LLAMA_3_SMALL | {"head_dim": 128}, 28, 3072, 8192, 24, 8),
    "meta-llama/Llama-3.3-70B-Instruct": (_LLAMA_3, 80, 8192, 28672, 64, 8),
    "mistralai/Mistral-7B-Instruct-v0.3": (_MISTRAL_7B, 32, 4096, 14336, 32, 8),
    "Qwen/Qwen2.5-7B-Instruct": (_QWEN_2, 28, 3584, 18944, 28, 4),
    "Qwen/Qwen2.5-72B-Instruct": (_QWEN_2, 80, 8192, 29568, 64, 8),
    "Qwen/Qwen3-0.6B": (_QWEN_3 | {"tie_word_embeddings": True}, 28, 1024, 3072, 16, 8),
    "Qwen/Qwen3-1.7B": (_QWEN_3 | {"tie_word_embeddings": True}, 28, 2048, 6144, 16, 8),
    "Qwen/Qwen3-4B": (_QWEN_3 | {"tie_word_embeddings": True}, 36, 2560, 9728, 32, 8),
    "Qwen/Qwen3-8B": (_QWEN_3, 36, 4096, 12288, 32, 8),
    "Qwen/Qwen3-14B": (_QWEN_3, 40, 5120, 17408, 40, 8),
    "Qwen/Qwen3-32B": (_QWEN_3, 64, 5120, 25600, 64, 8),
}
_INSTRUCT = ("meta-llama/Llama-3.1-", "meta-llama/Llama-3.2-")  # a base model and an -Instruct of the same shape


def public_models() -> list[str]:
    """The ids there are, but for the -Instruct models that share the shape of a base model."""
    return list(_SHAPES)


def public_id(model: str) -> str | None:
    """The id whose shape a model has by its name: an id of the hub, or a folder that is called as one is."""
    name = model.rstrip("/").rpartition("/")[2].lower()
    for known in _SHAPES:
        names = {known.rpartition("/")[2].lower()}
        if known.startswith(_INSTRUCT):
            names |= {f"{each}-instruct" for each in names}
        if name in names:
            return known
    return None


def public_spec(known: str) -> ModelSpec:
    """Of one of `public_models`."""
    family, num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads = _SHAPES[known]
    config = family | {
        "num_hidden_layers": num_layers,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
    }
    return parse_model_spec(config, {})
