"""Steps of made-up tokens are as large as any, and run on a cache of a single block."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from manta.configs.model import read_model_spec
from manta.configs.schema import ServeConfig
from manta.kernels.metadata import AttentionMetadata, KVCache
from manta.workers.limits import Limits
from manta.workers.loader import load_model
from manta.workers.mesh import Mesh
from manta.workers.model import HiddenShape
from manta.workers.models.decoder import CausalLM, allocate_kv_cache
from manta.workers.runner import Runner
from manta.workers.scorer import MAX_HOST_ROWS
from manta.workers.stage import Stage
from manta.workers.warmup import run_largest_steps, run_small_steps
from tests.support.checkpoints import make_checkpoint
from tests.support.gpu_like import Recorder, use_plain_torch

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CausalLM:
    use_plain_torch(monkeypatch)
    folder = make_checkpoint(tmp_path, "qwen3")
    return load_model(folder, read_model_spec(folder), Mesh.single(CPU), torch.float32)


class Watched:
    """A model, and the sizes of the steps that it ran: tokens, decode rows, rows, longest context, rows of logits."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.steps: list[tuple[int, int, int, int]] = []
        self.logits_rows: list[int] = []

    def __call__(self, x: Tensor, metadata: AttentionMetadata, kv_cache: KVCache, sampled: Any = None) -> Tensor:
        self.steps.append((x.shape[0], metadata.num_decodes, metadata.num_rows, metadata.max_seq_len))
        return self.model(x, metadata, kv_cache, sampled)

    def logits(self, hidden: Tensor) -> Tensor:
        self.logits_rows.append(hidden.shape[0])
        return self.model.logits(hidden)


def make(
    model: CausalLM, config: ServeConfig, max_model_len: int, on_device: bool, num_blocks: int
) -> tuple[Watched, Runner]:
    watched = Watched(model)
    cache = allocate_kv_cache(model, num_blocks, config.block_size, torch.float32, CPU)
    limits = Limits(
        num_blocks=num_blocks, block_size=config.block_size, max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens, max_model_len=max_model_len,
        vocab_size=model.spec.vocab_size,
    )  # fmt: skip
    stage = Stage(watched, model.mesh, cache, limits, HiddenShape(48, torch.float32))
    return watched, Runner(stage, on_device=on_device, record=Recorder() if on_device else None)


def config(max_num_seqs: int, max_num_batched_tokens: int) -> ServeConfig:
    return ServeConfig(
        model="m", block_size=8, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
    )


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    ("max_num_seqs", "num_tokens", "max_model_len"),
    [(5, 64, 200), (4, 100, 40), (1, 1, 9), (7, 7, 30), (3, 500, 20), (2, 64, 2)],
)
def test_largest_steps(
    model: CausalLM, on_device: bool, max_num_seqs: int, num_tokens: int, max_model_len: int
) -> None:
    watched, runner = make(model, config(max_num_seqs, num_tokens), max_model_len, on_device, num_blocks=1)
    watched.steps.clear(), watched.logits_rows.clear()
    run_largest_steps(runner, config(max_num_seqs, num_tokens), max_model_len)
    longest = max_model_len - 1
    assert max(tokens for tokens, *_ in watched.steps) == min(num_tokens, max_num_seqs * longest)
    assert max(rows for _, _, rows, _ in watched.steps) == max_num_seqs
    assert max_num_seqs <= max(watched.logits_rows) <= (max_num_seqs if on_device else MAX_HOST_ROWS)
    asked = sum(tokens for tokens, *_ in watched.steps)
    assert sum(watched.logits_rows) == asked, "every token is asked about"
    assert watched.steps[1] == (min(num_tokens, longest), 0, 1, longest)
    assert watched.steps[2] == (min(64, num_tokens, longest), 0, 1, longest)
    if max_num_seqs > 1 and max_model_len > 3:
        beside = min(64, num_tokens - 1, longest)
        long = max_model_len - 3
        alone = (1, 1, 1, max_model_len if on_device else long + 2)  # recorded for any length
        assert watched.steps[3:] == [(1, 0, 1, long), (1 + beside, 1, 2, max(long + 1, beside)), alone]


@pytest.mark.parametrize("on_device", [False, True])
def test_small_steps(model: CausalLM, on_device: bool) -> None:
    watched, runner = make(model, config(5, 64), 60, on_device, num_blocks=2)
    watched.steps.clear()
    run_small_steps(runner, config(5, 64), 60)
    steps = [step[:3] for step in watched.steps]
    assert steps == [(48, 0, 3), (19, 3, 4), (4, 4, 4), (1, 1, 1)]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    ("max_num_seqs", "num_tokens", "max_model_len"), [(5, 64, 200), (1, 1, 9), (3, 500, 20), (2, 64, 2)]
)
def test_steps_of_a_model_without_a_head(
    model: CausalLM, on_device: bool, max_num_seqs: int, num_tokens: int, max_model_len: int
) -> None:
    watched, runner = make(model, config(max_num_seqs, num_tokens), max_model_len, on_device, num_blocks=2)
    watched.steps.clear(), watched.logits_rows.clear()
    run_largest_steps(runner, config(max_num_seqs, num_tokens), max_model_len, generates=False)
    assert max(tokens for tokens, *_ in watched.steps) == min(num_tokens, max_num_seqs * max_model_len)
    assert max(rows for _, _, rows, _ in watched.steps) == max_num_seqs
    assert watched.steps[1:] == [(min(most, num_tokens, max_model_len), 0, 1, max_model_len) for most in (500, 64)]
    run_small_steps(runner, config(max_num_seqs, num_tokens), max_model_len, generates=False)
    assert not watched.logits_rows


@pytest.mark.parametrize("max_model_len", [1, 2, 4])
def test_lengths_that_leave_no_room_for_steps(model: CausalLM, max_model_len: int) -> None:
    _, runner = make(model, config(2, 8), max_model_len, True, num_blocks=2)
    run_small_steps(runner, config(2, 8), max_model_len)
    run_largest_steps(runner, config(2, 8), max_model_len)
