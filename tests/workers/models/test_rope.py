"""Rotary tables equal those of transformers."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from manta.configs.model import RopeSpec
from manta.workers.rope import rope_table

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("spec", "parameters"),
    [
        (RopeSpec(), {"rope_type": "default", "rope_theta": 10000.0}),
        (RopeSpec(theta=5e5), {"rope_type": "default", "rope_theta": 5e5}),
        (RopeSpec(kind="linear", factor=4.0), {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
        (RopeSpec(theta=5e5, kind="llama3", factor=8.0), {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}),
    ],
    ids=["default", "theta", "linear", "llama3"],
)
@pytest.mark.parametrize("head_dim", [20, 128])
def test_rope_table_equals_transformers(spec: RopeSpec, parameters: dict[str, object], head_dim: int) -> None:
    config = LlamaConfig(
        head_dim=head_dim,
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=20000,
        rope_parameters=parameters,
    )
    positions = torch.tensor([0, 1, 63, 8191, 19999])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    half = head_dim // 2
    table = rope_table(spec, head_dim, 20000)[positions]
    assert torch.allclose(table[:, :half], cos[0, :, :half], atol=1e-6)
    assert torch.allclose(table[:, half:], sin[0, :, :half], atol=1e-6)
