"""Steps whose inputs the host builds: on a CPU it is the device."""

import numpy as np
from torch import Tensor

from manta.workers.batch import Batch, build_batch
from manta.workers.clock import Clock
from manta.workers.feedback import Feedback
from manta.workers.pooler import Pooler
from manta.workers.records import NOTHING, StepOutput
from manta.workers.sampler import Sampler
from manta.workers.scorer import Scorer
from manta.workers.slot_table import Rows, SlotTable
from manta.workers.stage import Stage
from manta.workers.token_table import TokenTable
from manta.workers.transfer import upload


class HostSteps:
    """This stage's layers over the rows of a step."""

    def __init__(
        self,
        stage: Stage,
        slots: SlotTable,
        tokens: TokenTable,
        sampler: Sampler,
        scorer: Scorer,
        pooler: Pooler,
        feedback: Feedback,
        clock: Clock,
    ) -> None:
        self._stage = stage
        self._slots = slots
        self._tokens = tokens
        self._sampler = sampler
        self._scorer = scorer
        self._pooler = pooler
        self._feedback = feedback
        self._clock = clock

    def prepare(self) -> None:
        """There is nothing to bring up to date."""

    def compute(self, lane: int, rows: Rows) -> StepOutput:
        """Returns what the rows tell on the last stage, nothing elsewhere."""
        stage, mesh = self._stage, self._stage.mesh
        batch = build_batch(rows, self._slots, stage.limits.block_size, mesh.device)
        if mesh.is_last_stage:
            return self._finish(batch, rows)
        hidden = stage.model(self._inputs(batch), batch.metadata, stage.kv_cache)
        mesh.send_hidden(hidden)
        if mesh.is_first_stage and rows.sampled.size:
            self._feedback.expect(lane, rows.sampled_slots, batch.sampled_slots, batch.sampled_positions)
        return NOTHING

    def _finish(self, batch: Batch, rows: Rows) -> StepOutput:
        """On the last stage: all layers, and what is told of the rows."""
        stage = self._stage
        asked, pieces = self._scorer.prompt_tokens(rows), self._pooler.pieces(rows)
        if asked is None and pieces is None:
            hidden = stage.model(self._inputs(batch), batch.metadata, stage.kv_cache, batch.sampled_tokens)
            return self._sample(batch, rows, hidden, NOTHING)
        kept, index, sampled = None, None, batch.sampled_tokens  # None: all
        # Where most tokens count anyway, leaving out the others saves less than their attention by itself costs.
        if asked is None and pieces is not None and 4 * pieces.tokens.size < rows.num_tokens.sum():
            last = np.cumsum(rows.num_tokens)[rows.sampled] - 1
            kept = np.union1d(last, pieces.tokens)
            index, sampled = upload([kept, np.searchsorted(kept, last)], stage.mesh.device)
        hidden = stage.model(self._inputs(batch), batch.metadata, stage.kv_cache, index)
        records = [] if asked is None else self._scorer.of_prompts(asked, hidden, stage.model.logits)
        vectors = None if pieces is None else self._pooler.pool(pieces, hidden, kept)
        return self._sample(batch, rows, hidden[sampled], StepOutput(None, records, vectors))

    def _sample(self, batch: Batch, rows: Rows, hidden: Tensor, output: StepOutput) -> StepOutput:
        """The output with the tokens of the rows that sample, whose last hidden states [N, size] are given."""
        if not rows.sampled.size:
            return output
        logits = self._stage.model.logits(hidden)
        tokens, output = self._sampler.sample_rows(logits, rows, self._scorer, output)
        self._tokens.put(batch.sampled_slots, batch.sampled_positions, tokens)
        if not self._stage.mesh.is_first_stage:
            self._stage.mesh.send_tokens(tokens)
        return output

    def _inputs(self, batch: Batch) -> Tensor:
        """Token ids int64 [T] on the first stage, hidden states [T, hidden] on the others."""
        stage, positions = self._stage, batch.metadata.positions
        if stage.mesh.is_first_stage:
            return self._tokens.gather(batch.token_slots, positions)
        with self._clock.waiting():
            return stage.mesh.recv_hidden(positions.shape[0], stage.hidden.size, stage.hidden.dtype)
