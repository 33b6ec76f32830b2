"""Runs steps: the plan, the slots, the layers, the tokens, in this order."""

import torch
from torch import Tensor

from manta.protos.worker_pb2 import StepPlan
from manta.workers.block_bytes import block_bytes_of
from manta.workers.block_copy import BlockCopies
from manta.workers.clock import Reading, StepTime, make_clock
from manta.workers.decode_graphs import Record
from manta.workers.device_slots import DeviceSlots
from manta.workers.device_steps import DeviceSteps
from manta.workers.feedback import Feedback
from manta.workers.grammars import Grammars
from manta.workers.host_steps import HostSteps
from manta.workers.pages_ahead import PagesAhead
from manta.workers.pooler import Pooler
from manta.workers.records import NOTHING, StepOutput, encode
from manta.workers.sampler import Sampler
from manta.workers.sampling_table import SamplingTable
from manta.workers.scorer import MAX_HOST_ROWS, Scorer
from manta.workers.slot_table import SlotChanges, SlotTable
from manta.workers.stage import Stage
from manta.workers.token_table import TokenTable
from manta.workers.transfer import download


class Step:
    """One step on its way through the device. What it tells waits for it, on any thread."""

    def __init__(self, tokens: Tensor | None, output: StepOutput, reading: Reading) -> None:
        """tokens: int64 [N], in host memory when the reading's wait is over, as the records and vectors of `output`."""
        self._tokens = tokens
        self._output = output
        self._reading = reading

    def time(self) -> StepTime:
        return self._reading.wait()

    def tokens(self) -> bytes:
        """int32 little-endian, one per sampled row; empty on ranks that do not sample."""
        self._reading.wait()
        return b"" if self._tokens is None else self._tokens.numpy().astype("<i4").tobytes()

    def logprobs(self) -> bytes:
        """Records of the rows that asked for log-probabilities, as in StepResult."""
        if not self._output.records:
            return b""
        self._reading.wait()
        return encode(self._output.records)

    def vectors(self) -> bytes:
        """Of the prompts that end with one, as in StepResult."""
        if self._output.vectors is None:
            return b""
        self._reading.wait()
        return self._output.vectors.encode()


class Runner:
    """One rank's part in every step. Owns the slots, the token ids and the sampling parameters; uses model and cache.

    One thread calls it. Only counts are known on the host, so on a GPU `run` returns when the step is launched.
    """

    def __init__(
        self, stage: Stage, *, on_device: bool = False, record: Record | None = None, grammars: Grammars | None = None
    ) -> None:
        """on_device: whether the device builds its own inputs; `record` then makes recordings of decode steps.
        grammars: for ranks that sample."""
        mesh, limits = stage.mesh, stage.limits
        self._mesh = mesh
        self._copies = BlockCopies(stage.kv_cache)
        self.blocks = block_bytes_of(stage.kv_cache) if stage.kv_cache else None  # for moves, on any thread
        self._pages = PagesAhead(stage.kv_cache) if mesh.device.type == "cpu" else None
        changes = SlotChanges() if on_device else None
        if on_device:
            tokens = TokenTable(mesh.device, limits.max_num_slots, limits.max_model_len)
        else:
            tokens = TokenTable(mesh.device)
        self.grammars = grammars
        sampling = SamplingTable(limits.vocab_size, grammars)
        self._slots = SlotTable(limits, tokens, sampling, changes)
        self._feedback = Feedback(mesh, tokens)
        self._clock = make_clock(mesh.device)
        self._sampler = sampler = Sampler(sampling, tokens)
        max_scored_rows = limits.max_num_seqs if on_device else MAX_HOST_ROWS
        scorer = Scorer(sampling, tokens, max_scored_rows, self.is_output_rank)
        pooler = Pooler(self._slots.pooled, self.is_output_rank)
        self._steps: HostSteps | DeviceSteps
        if changes is None:
            self._steps = HostSteps(stage, self._slots, tokens, sampler, scorer, pooler, self._feedback, self._clock)
        else:
            device_slots = DeviceSlots(limits, tokens, mesh.device)
            self._steps = DeviceSteps(stage, changes, device_slots, sampler, scorer, pooler, self._feedback, record)

    @property
    def is_output_rank(self) -> bool:
        """Whether this rank is the one that answers steps."""
        return self._mesh.is_last_stage and self._mesh.tp_rank == 0

    @torch.inference_mode()  # the token table's memory comes from `run` and may only be written so
    def clear(self) -> None:
        """Frees every slot, for a new epoch."""
        self._feedback.drain()
        self._slots.clear()

    def use_idle_time(self) -> bool:
        """Does a few milliseconds of work that later steps need not do; False if there is none."""
        return self._pages is not None and self._pages.advance()

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Step:
        """Applies the plan and computes its rows. Raises PlanError, or what the model or the mesh raises; the ranks
        are then out of step, and only a new epoch can follow."""
        self._clock.begin()
        with self._clock.waiting():
            self._feedback.receive_for(plan)
        rows = self._slots.apply(plan)
        if self._pages is not None:
            self._pages.note(plan)
        self._copies.apply(plan)
        self._steps.prepare()
        self._clock.launches()
        if self._mesh.is_last_stage:
            self._sampler.begin(rows)
        output = self._steps.compute(plan.lane, rows) if rows.slots.size else NOTHING
        # Before the step's end is marked: whoever waits for that reads the tokens.
        tokens = None if output.tokens is None else download(output.tokens)
        return Step(tokens, output, self._clock.end())
