"""Runs steps: batch, model, sampler, cache, in this order, and passes states and tokens between stages."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from manta.kernels.metadata import AttentionMetadata, KVCache
from manta.protos.worker_pb2 import StepPlan
from manta.workers.batch import Batch, build_batch
from manta.workers.block_copy import copy_blocks
from manta.workers.clock import Reading, StepTime, make_clock
from manta.workers.feedback import Feedback
from manta.workers.limits import Limits
from manta.workers.mesh import Mesh
from manta.workers.sampler import Sampler
from manta.workers.sampling_table import SamplingTable
from manta.workers.slot_table import Rows, SlotTable
from manta.workers.token_table import TokenTable


class Model(Protocol):
    """What the runner needs of a model; `models.decoder.CausalLM` is one."""

    def __call__(
        self, x: Tensor, metadata: AttentionMetadata, kv_cache: KVCache, sampled: Tensor | None = None
    ) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class HiddenShape:
    """What travels between stages: rows of `size` values."""

    size: int
    dtype: torch.dtype


class Step:
    """One step on its way through the device. `tokens` and `time` wait for it, on any thread."""

    def __init__(self, tokens: Tensor | None, reading: Reading) -> None:
        self._tokens = tokens
        self._reading = reading

    def time(self) -> StepTime:
        return self._reading.wait()

    def tokens(self) -> bytes:
        """int32 little-endian, one per sampled row; empty on ranks that do not sample."""
        self._reading.wait()
        return b"" if self._tokens is None else self._tokens.numpy().astype("<i4").tobytes()


class Runner:
    """One rank's part in every step. Owns the slots, the token ids and the sampling parameters; uses model and cache.

    One thread calls it. Only counts are known on the host, so on a GPU `run` returns when the step is launched.
    """

    def __init__(self, model: Model, mesh: Mesh, kv_cache: KVCache, limits: Limits, hidden: HiddenShape) -> None:
        self._model = model
        self._mesh = mesh
        self._kv_cache = kv_cache
        self._limits = limits
        self._hidden = hidden
        self._tokens = TokenTable(mesh.device)
        sampling = SamplingTable(limits.vocab_size)
        self._slots = SlotTable(limits, self._tokens, sampling)
        self._sampler = Sampler(sampling, self._tokens)
        self._feedback = Feedback(mesh, self._tokens)
        self._clock = make_clock(mesh.device)

    @property
    def is_output_rank(self) -> bool:
        """Whether this rank is the one that answers steps."""
        return self._mesh.is_last_stage and self._mesh.tp_rank == 0

    @torch.inference_mode()  # the token table's memory comes from `run` and may only be written so
    def clear(self) -> None:
        """Frees every slot, for a new epoch."""
        self._feedback.drain()
        self._slots.clear()

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Step:
        """Applies the plan and computes its rows. Raises PlanError, or what the model or the mesh raises; the ranks
        are then out of step, and only a new epoch can follow."""
        self._clock.begin()
        with self._clock.waiting():
            self._feedback.receive_for(plan)
        rows = self._slots.apply(plan)
        copy_blocks(plan, self._kv_cache)
        tokens = self._compute(plan.lane, rows) if rows.slots.size else None
        return Step(_on_host(tokens), self._clock.end())

    def _compute(self, lane: int, rows: Rows) -> Tensor | None:
        """This stage's layers over the rows. Returns the sampled ids int64 [N] on the last stage, None elsewhere."""
        mesh = self._mesh
        batch = build_batch(rows, self._slots, self._limits.block_size, mesh.device)
        sampled = batch.sampled_tokens if mesh.is_last_stage else None
        hidden = self._model(self._inputs(batch), batch.metadata, self._kv_cache, sampled)
        if not mesh.is_last_stage:
            mesh.send_hidden(hidden)
            if mesh.is_first_stage and rows.sampled.size:
                self._feedback.expect(lane, rows, batch)
            return None
        if not rows.sampled.size:
            return None
        logits = self._model.logits(hidden)
        tokens = self._sampler.sample(logits, rows.sampled_slots, rows.sampled_positions)
        self._tokens.put(batch.sampled_slots, batch.sampled_positions, tokens)
        if not mesh.is_first_stage:
            mesh.send_tokens(tokens)
        return tokens

    def _inputs(self, batch: Batch) -> Tensor:
        """Token ids int64 [T] on the first stage, hidden states [T, hidden] on the others."""
        positions = batch.metadata.positions
        if self._mesh.is_first_stage:
            return self._tokens.gather(batch.token_slots, positions)
        with self._clock.waiting():
            return self._mesh.recv_hidden(positions.shape[0], self._hidden.size, self._hidden.dtype)


def _on_host(tokens: Tensor | None) -> Tensor | None:
    """The tokens in host memory; on a GPU the copy is only launched, and the step's reading tells when it is over."""
    if tokens is None or tokens.device.type == "cpu":
        return tokens
    return torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True).copy_(tokens, non_blocking=True)
