"""Steps whose inputs the device builds from its own columns of the slots. The host names the rows and launches; it
knows counts and never waits. Steps in which everyone decodes are replayed from recordings, if there are any."""

import numpy as np
import torch
from torch import Tensor

from manta.kernels import ops
from manta.kernels.metadata import AttentionMetadata
from manta.workers.columns import Ints
from manta.workers.decode_graphs import DecodeGraph, DecodeGraphs, Record, graph_sizes
from manta.workers.device_slots import DeviceSlots
from manta.workers.feedback import Feedback
from manta.workers.pooler import Pooler
from manta.workers.records import NOTHING, StepOutput
from manta.workers.sampler import Sampler
from manta.workers.scorer import Scorer
from manta.workers.slot_table import Rows, SlotChanges
from manta.workers.stage import Stage
from manta.workers.step_buffers import StepBuffers
from manta.workers.transfer import upload


class DeviceSteps:
    """This stage's layers over the rows of a step."""

    def __init__(
        self,
        stage: Stage,
        changes: SlotChanges,
        slots: DeviceSlots,
        sampler: Sampler,
        scorer: Scorer,
        pooler: Pooler,
        feedback: Feedback,
        record: Record | None,
    ) -> None:
        """Without `record` every step is launched operation by operation."""
        mesh, limits = stage.mesh, stage.limits
        self._stage = stage
        self._changes = changes
        self._slots = slots
        self._sampler = sampler
        self._scorer = scorer
        self._pooler = pooler
        self._feedback = feedback
        hidden = None
        if not mesh.is_first_stage:
            shape = (limits.max_num_batched_tokens, stage.hidden.size)
            hidden = torch.zeros(shape, dtype=stage.hidden.dtype, device=mesh.device)
        num_rows = min(limits.max_num_batched_tokens, limits.max_num_slots)
        self._buffers = StepBuffers.empty(
            limits.max_num_batched_tokens, num_rows, limits.max_blocks_per_seq, hidden, mesh.device
        )
        self._graphs: DecodeGraphs | None = None
        if record is not None:
            with torch.inference_mode():
                sizes, out = graph_sizes(limits.max_num_seqs), (stage.hidden.size, stage.hidden.dtype)
                if mesh.is_last_stage:
                    out = (limits.vocab_size, torch.float32)
                output = torch.zeros(sizes[-1], out[0], dtype=out[1], device=mesh.device)
                self._graphs = DecodeGraphs(sizes, self._buffers.for_decode, self._decode, output, record)

    def prepare(self) -> None:
        """Brings the device's columns up to date with the plan that was just applied; before every step."""
        self._slots.apply(self._changes.take())

    def compute(self, lane: int, rows: Rows) -> StepOutput:
        """Returns what the rows tell on the last stage, nothing elsewhere."""
        graph = self._graphs.fitting(rows.slots.size) if self._graphs is not None and rows.only_decode else None
        if graph is not None:
            return self._finish(lane, rows, graph.buffers, self._replay(rows, graph))
        buffers, metadata = self._fill(rows)
        out = self._forward(buffers, metadata)
        mesh = self._stage.mesh
        output = NOTHING
        if mesh.is_last_stage:
            output = self._tell_of_prompts(rows, out)
            if not rows.sampled.size:
                return self._finish(lane, rows, buffers, None, output)
            last = buffers.inputs.last_tokens
            if rows.sampled.size < rows.slots.size:
                last = last[upload([rows.sampled], mesh.device)[0]]
            out = self._stage.model.logits(out[last])
        elif not mesh.is_first_stage:
            out = out.clone()  # it lies in the buffer for hidden states, which is the next step's
        return self._finish(lane, rows, buffers, out, output)

    def _tell_of_prompts(self, rows: Rows, hidden: Tensor) -> StepOutput:
        """hidden: [T, size], of all tokens of the step."""
        asked, pieces = self._scorer.prompt_tokens(rows), self._pooler.pieces(rows)
        if asked is None and pieces is None:
            return NOTHING
        records = [] if asked is None else self._scorer.of_prompts(asked, hidden, self._stage.model.logits)
        return StepOutput(None, records, None if pieces is None else self._pooler.pool(pieces, hidden))

    def _decode(self, buffers: StepBuffers) -> Tensor:
        """What is recorded: from slots to logits [R, vocab] on the last stage, to hidden states [R, hidden] before."""
        stage, limits = self._stage, self._stage.limits
        metadata = buffers.metadata(buffers.slots.shape[0], 1, limits.max_model_len, limits.block_size)
        out = self._forward(buffers, metadata)
        return stage.model.logits(out) if stage.mesh.is_last_stage else out

    def _forward(self, buffers: StepBuffers, metadata: AttentionMetadata) -> Tensor:
        stage, inputs = self._stage, buffers.inputs
        ops.build_inputs(self._slots.columns, buffers.slots, buffers.query_start, stage.limits.block_size, inputs)
        x = inputs.token_ids if buffers.hidden is None else buffers.hidden
        return stage.model(x, metadata, stage.kv_cache)

    def _replay(self, rows: Rows, graph: DecodeGraph) -> Tensor:
        """Logits of the rows that are there, until the next replay, or their hidden states."""
        num_rows = rows.slots.size
        graph.set_slots(rows.slots)
        self._receive(graph.buffers, num_rows)
        out = graph.replay()[:num_rows]
        return out if self._stage.mesh.is_last_stage else out.clone()  # it is sent while the next step runs

    def _fill(self, rows: Rows) -> tuple[StepBuffers, AttentionMetadata]:
        num_tokens, num_rows = int(rows.num_tokens.sum()), rows.slots.size
        longest, block_size = int(rows.seq_lens.max()), self._stage.limits.block_size
        buffers = self._buffers.first(num_tokens, num_rows, -(-longest // block_size))
        query_start = np.zeros(num_rows + 1, np.int32)
        np.cumsum(rows.num_tokens, out=query_start[1:])
        slots, starts = upload([rows.slots.astype(np.int32), query_start], self._stage.mesh.device)
        buffers.slots.copy_(slots)
        buffers.query_start.copy_(starts)
        self._receive(buffers, num_tokens)
        return buffers, buffers.metadata(rows.num_decodes, int(rows.num_tokens.max()), longest, block_size)

    def _receive(self, buffers: StepBuffers, num_tokens: int) -> None:
        """The hidden states of the stage before."""
        if buffers.hidden is not None:
            self._stage.mesh.recv_hidden_to(buffers.hidden[:num_tokens])

    def _finish(
        self, lane: int, rows: Rows, buffers: StepBuffers, out: Tensor | None, output: StepOutput = NOTHING
    ) -> StepOutput:
        """Samples or passes on, and moves the device's columns to where the step leaves them."""
        mesh, num_rows = self._stage.mesh, rows.slots.size
        tokens = None
        if not mesh.is_last_stage:
            assert out is not None
            mesh.send_hidden(out)
            if mesh.is_first_stage and rows.sampled.size:
                slots, positions = upload([rows.sampled_slots, rows.sampled_positions], mesh.device)
                self._feedback.expect(lane, rows.sampled_slots, slots, positions)
        elif out is not None:
            tokens, output = self._sampler.sample_rows(out, rows, self._scorer, output)
            if not mesh.is_first_stage:
                mesh.send_tokens(tokens)
        part = buffers.first(buffers.inputs.token_ids.shape[0], num_rows, buffers.inputs.block_tables.shape[1])
        by_row = _by_row(tokens, rows.sampled, num_rows, mesh.device)
        ops.advance(self._slots.columns, part.slots, part.query_start, part.inputs, by_row)
        return output


def _by_row(tokens: Tensor | None, sampled: Ints, num_rows: int, device: torch.device) -> Tensor:
    """int64 [R]: the tokens of the rows that sample; 0 for others, and for all where they come later."""
    if tokens is not None and sampled.size == num_rows:
        return tokens
    by_row = torch.zeros(num_rows, dtype=torch.int64, device=device)
    if tokens is not None:
        by_row[upload([sampled], device)[0]] = tokens
    return by_row
