"""Runners on a CPU that work as on a GPU: operation by operation, inputs built by the device, steps recorded."""

from collections.abc import Callable

import pytest
import torch

from manta.kernels import ops, reference
from manta.workers.decode_graphs import Record
from manta.workers.grammars import Grammars
from manta.workers.limits import Limits
from manta.workers.model import HiddenShape
from manta.workers.models.decoder import CausalLM, allocate_kv_cache
from manta.workers.runner import Runner
from manta.workers.stage import Stage

BLOCK_SIZE = 8
NUM_BLOCKS = 128


class Recorder:
    """Recordings that run their function again, and count."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def __call__(self, run: Callable[[], object]) -> "_Recording":
        self.num_recorded += 1
        run()  # as a warm-up does: nothing is there yet, so nothing may change
        return _Recording(self, run)


class _Recording:
    def __init__(self, recorder: Recorder, run: Callable[[], object]) -> None:
        self._recorder = recorder
        self._run = run

    def replay(self) -> None:
        self._recorder.num_replayed += 1
        self._run()


def use_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models run operation by operation in plain torch: rows that are not there have to be harmless."""
    monkeypatch.setattr(ops, "uses_cpu_decoder", lambda *_: False)
    for name in ("rms_norm", "add_rms_norm", "silu_mul", "rope_kv_write", "paged_attention"):
        monkeypatch.setattr(ops, name, getattr(reference, name))


def gpu_like_runner(
    model: CausalLM, *, on_device: bool, record: Record | None = None, grammars: Grammars | None = None
) -> Runner:
    """A runner for six sequences of up to 120 tokens."""
    limits = Limits(
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_num_seqs=6,
        max_num_batched_tokens=64,
        max_model_len=120,
        vocab_size=model.spec.vocab_size,
    )
    cache = allocate_kv_cache(model, NUM_BLOCKS, BLOCK_SIZE, torch.float32, model.mesh.device)
    hidden = HiddenShape(model.spec.hidden_size, torch.float32)
    return Runner(
        Stage(model, model.mesh, cache, limits, hidden), on_device=on_device, record=record, grammars=grammars
    )
