"""Logits of every model family equal transformers', for whole prompts, chunks, decodes and mixed batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from manta.configs.model import read_model_spec
from manta.kernels import ops
from manta.workers.loader import load_model
from manta.workers.mesh import Mesh
from manta.workers.models import decoder
from manta.workers.models.decoder import allocate_kv_cache
from tests.support.checkpoints import FAMILIES, make_checkpoint, make_model
from tests.support.paging import PagedSequences
from tests.support.steps import BLOCK_SIZE, NUM_BLOCKS, STEPS, run_steps, sequence_tokens
from tests.support.tolerances import LOGITS, relative_error

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def expected_logits(family: str, **overrides: Any) -> Tensor:
    """float32 [4, 64, vocab] of transformers, each sequence whole."""
    model = make_model(family, **overrides)
    with torch.no_grad():
        logits: Tensor = model(sequence_tokens(model.config.vocab_size)).logits.float()
    return logits


def assert_steps_match(steps: list[Tensor] | None, expected: Tensor, tolerance: float) -> None:
    """Compares what each step gave with the same positions of the whole sequences."""
    assert steps is not None
    computed = [0] * len(expected)
    for rows, logits in zip(STEPS, steps, strict=True):
        parts = []
        for sequence, num_new in rows:
            parts.append(expected[sequence, computed[sequence] : computed[sequence] + num_new])
            computed[sequence] += num_new
        assert relative_error(logits, torch.cat(parts)) < tolerance, rows


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    expected = expected_logits(family)
    assert len(set(expected.argmax(dim=-1).flatten().tolist())) > 10  # or the comparison says little
    steps = run_steps(make_checkpoint(tmp_path, family), Mesh.single(CPU), torch.float32)
    assert_steps_match(steps, expected, LOGITS[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama-bias", "mistral", "qwen2", "qwen3"])
def test_half_precision_logits_are_near(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    steps = run_steps(make_checkpoint(tmp_path, family), Mesh.single(CPU), dtype)
    assert_steps_match(steps, expected_logits(family), LOGITS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama-bias", "qwen3"])
def test_logits_where_the_cpu_decoder_is_not_used(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operation by operation, as CPUs with matrix units run bfloat16 models."""
    monkeypatch.setattr(ops, "uses_cpu_decoder", lambda *_: False)
    monkeypatch.setattr(decoder, "_cpu_stage", None)  # or the comparison is with the wrong path
    steps = run_steps(make_checkpoint(tmp_path, family), Mesh.single(CPU), dtype)
    assert_steps_match(steps, expected_logits(family), LOGITS[dtype])


def test_sharded_checkpoint_with_an_index(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    steps = run_steps(tmp_path, Mesh.single(CPU), torch.float32)
    assert_steps_match(steps, expected_logits("llama"), LOGITS[torch.float32])


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64},
        {"head_dim": 128, "hidden_size": 42},
        {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 80},
        {"num_hidden_layers": 1, "vocab_size": 17},
    ],
    ids=["one-head", "wide-heads", "head-dim-80", "one-layer"],
)
def test_other_shapes(overrides: dict[str, Any], tmp_path: Path) -> None:
    steps = run_steps(make_checkpoint(tmp_path, "llama", **overrides), Mesh.single(CPU), torch.float32)
    assert_steps_match(steps, expected_logits("llama", **overrides), LOGITS[torch.float32])


@pytest.mark.parametrize("on_cpu_decoder", [True, False], ids=["decoder", "operations"])
def test_only_sampled_tokens(on_cpu_decoder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model gives of some tokens is what it gives of them among all."""
    if not on_cpu_decoder:
        monkeypatch.setattr(ops, "uses_cpu_decoder", lambda dtype, device: False)
    folder = make_checkpoint(tmp_path, "llama")
    spec = read_model_spec(folder)
    model = load_model(folder, spec, Mesh.single(CPU), torch.float32)
    tokens = sequence_tokens(spec.vocab_size)[0, :29]
    metadata = PagedSequences(BLOCK_SIZE, NUM_BLOCKS).step([(0, 20), (1, 9)])
    hidden = []
    for sampled in (None, torch.tensor([19, 28]), torch.tensor([3])):
        kv_cache = allocate_kv_cache(model, NUM_BLOCKS, BLOCK_SIZE, torch.float32, CPU)
        hidden.append(model(tokens, metadata, kv_cache, sampled).clone())
    assert relative_error(hidden[1], hidden[0][[19, 28]]) < 1e-6
    assert relative_error(hidden[2], hidden[0][[3]]) < 1e-6
