"""The next token of every row on a GPU: stop tokens and penalties, then the best token or a draw, in two launches."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manta.kernels.row_search_triton import NUM_WARPS, TILE
from manta.kernels.sample_penalties_triton import MAX_PROGRAMS, apply_penalties, make_counts
from manta.kernels.sample_row_triton import sample_kernel
from manta.kernels.sampling_parameters import Parameters
from manta.kernels.sampling_rows import SamplingRows


def sample(logits: Tensor, rows: SamplingRows, history: Tensor, counts: Tensor | None) -> Tensor:
    """Token ids int64 [N] of logits float32 [N, vocab], rows contiguous; with penalties, which change logits in place.

    history: int32 [slots, length], each slot's tokens before its position. counts: of `make_counts`; None if no row has
    penalties nor a min_tokens to reach. A row that draws from NaN, +inf or nothing but -inf gets the last token. A
    row's token depends on that row alone.
    """
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    num_rows, vocab_size = logits.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if not num_rows:
        return out
    if counts is not None:
        apply_penalties(logits, rows, history, counts)
    values = torch.empty(num_rows, TILE, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_rows, TILE, dtype=torch.int32, device=logits.device)
    sample_kernel[(num_rows,)](
        logits, logits.stride(0), rows.floats, rows.floats.stride(0), rows.ints, rows.ints.stride(0), values, ids, out,
        VOCAB_SIZE=vocab_size, TILE=TILE, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


class RowSampler:
    """As `sample_cpu.RowSampler`, for logits on a GPU; waits for nothing."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def __call__(
        self,
        logits: Tensor,
        slots: NDArray[np.int64],
        positions: NDArray[np.int64],
        parameters: Parameters,
        history: Tensor,
    ) -> Tensor:
        """Token ids int64 [N] of logits float32 [N, vocab], which it may overwrite; row i belongs to slots[i] and
        chooses the token at positions[i]."""
        p = parameters
        is_early = positions - p.num_prompt_tokens[slots] < p.min_tokens[slots]
        has_penalties = (
            bool(is_early.any())
            or bool((p.presence_penalty[slots] != 0).any())
            or bool((p.frequency_penalty[slots] != 0).any())
            or bool((p.repetition_penalty[slots] != 1).any())
        )
        if self._counts is None:  # from the first call on, so that a worker's profile of memory includes it
            self._counts = make_counts(MAX_PROGRAMS, logits.shape[1], logits.device)
        rows = SamplingRows.of(slots, positions, p, logits.device)
        return sample(logits, rows, history, self._counts if has_penalties else None)
