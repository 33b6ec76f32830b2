"""Steps whose inputs the host builds: on a CPU it is the device."""

from torch import Tensor

from manta.workers.batch import Batch, build_batch
from manta.workers.clock import Clock
from manta.workers.feedback import Feedback
from manta.workers.records import NOTHING, Records, StepOutput
from manta.workers.sampler import Sampler
from manta.workers.scorer import Scorer
from manta.workers.slot_table import Rows, SlotTable
from manta.workers.stage import Stage
from manta.workers.token_table import TokenTable


class HostSteps:
    """This stage's layers over the rows of a step."""

    def __init__(
        self,
        stage: Stage,
        slots: SlotTable,
        tokens: TokenTable,
        sampler: Sampler,
        scorer: Scorer,
        feedback: Feedback,
        clock: Clock,
    ) -> None:
        self._stage = stage
        self._slots = slots
        self._tokens = tokens
        self._sampler = sampler
        self._scorer = scorer
        self._feedback = feedback
        self._clock = clock

    def prepare(self) -> None:
        """There is nothing to bring up to date."""

    def compute(self, lane: int, rows: Rows) -> StepOutput:
        """Returns the sampled ids on the last stage, nothing elsewhere."""
        stage, mesh = self._stage, self._stage.mesh
        batch = build_batch(rows, self._slots, stage.limits.block_size, mesh.device)
        asked = self._scorer.prompt_tokens(rows) if mesh.is_last_stage else None
        sampled = batch.sampled_tokens if mesh.is_last_stage and asked is None else None
        hidden = stage.model(self._inputs(batch), batch.metadata, stage.kv_cache, sampled)
        if not mesh.is_last_stage:
            mesh.send_hidden(hidden)
            if mesh.is_first_stage and rows.sampled.size:
                self._feedback.expect(lane, rows.sampled_slots, batch.sampled_slots, batch.sampled_positions)
            return NOTHING
        records: list[Records] = []
        if asked is not None:
            records = self._scorer.of_prompts(asked, hidden, stage.model.logits)
            hidden = hidden[batch.sampled_tokens]
        if not rows.sampled.size:
            return StepOutput(None, records)
        tokens, output = self._sampler.sample_rows(stage.model.logits(hidden), rows, self._scorer, records)
        self._tokens.put(batch.sampled_slots, batch.sampled_positions, tokens)
        if not mesh.is_first_stage:
            mesh.send_tokens(tokens)
        return output

    def _inputs(self, batch: Batch) -> Tensor:
        """Token ids int64 [T] on the first stage, hidden states [T, hidden] on the others."""
        stage, positions = self._stage, batch.metadata.positions
        if stage.mesh.is_first_stage:
            return self._tokens.gather(batch.token_slots, positions)
        with self._clock.waiting():
            return stage.mesh.recv_hidden(positions.shape[0], stage.hidden.size, stage.hidden.dtype)
