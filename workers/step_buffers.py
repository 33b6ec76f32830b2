"""Device memory of a step's inputs, used again by step after step."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from manta.kernels.metadata import AttentionMetadata
from manta.kernels.step_tensors import StepInputs


@dataclass(slots=True)
class StepBuffers:
    """A step of at most T tokens in R rows. Rows that are not there have slot -1 and no tokens."""

    slots: Tensor  # int32 [R]
    query_start: Tensor  # int32 [R + 1]
    inputs: StepInputs
    hidden: Tensor | None  # [T, hidden size]: what the stage before sent; None on the first one

    @classmethod
    def empty(
        cls, num_tokens: int, num_rows: int, max_blocks: int, hidden: Tensor | None, device: torch.device
    ) -> "StepBuffers":
        """Nothing is there; `hidden` is [at least T, hidden size]."""
        return cls(
            slots=torch.full((num_rows,), -1, dtype=torch.int32, device=device),
            query_start=torch.zeros(num_rows + 1, dtype=torch.int32, device=device),
            inputs=StepInputs.empty(num_tokens, num_rows, max_blocks, device),
            hidden=None if hidden is None else hidden[:num_tokens],
        )

    def for_decode(self, num_rows: int) -> "StepBuffers":
        """One token each; row r is token r, whether it is there or not. Who the rows are is the new buffers' own, all
        the rest is this memory: it is filled anew in every step."""
        device = self.slots.device
        part = self.first(num_rows, num_rows, self.inputs.block_tables.shape[1])
        part.slots = torch.full((num_rows,), -1, dtype=torch.int32, device=device)
        part.query_start = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
        return part

    def first(self, num_tokens: int, num_rows: int, num_blocks: int) -> "StepBuffers":
        """The same memory as a smaller step."""
        parts: dict[str, Tensor] = {}
        for field in fields(StepInputs):
            whole = getattr(self.inputs, field.name)
            is_by_row = field.name in ("seq_lens", "block_tables", "last_tokens", "sampled_positions")
            parts[field.name] = whole[: num_rows if is_by_row else num_tokens]
        parts["block_tables"] = parts["block_tables"][:, :num_blocks]
        hidden = None if self.hidden is None else self.hidden[:num_tokens]
        return StepBuffers(self.slots[:num_rows], self.query_start[: num_rows + 1], StepInputs(**parts), hidden)

    def metadata(self, num_decodes: int, max_query_len: int, max_seq_len: int, block_size: int) -> AttentionMetadata:
        """Views of the buffers as attention reads them."""
        inputs = self.inputs
        return AttentionMetadata(
            query_start=self.query_start,
            seq_lens=inputs.seq_lens,
            block_tables=inputs.block_tables,
            slot_mapping=inputs.slot_mapping,
            positions=inputs.positions,
            num_decodes=num_decodes,
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            block_size=block_size,
        )
