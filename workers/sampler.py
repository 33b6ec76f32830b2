"""Chooses the next token of every row that samples.

Order, as in vLLM: allowed tokens, bad words and biases, then grammars, then min_tokens and penalties, then temperature,
then min_p and top_k, then top_p on what these leave, then one draw. Greedy rows take the best token after min_tokens
and penalties.
"""

import numpy as np
import torch
from torch import Tensor

from manta.kernels import ops
from manta.workers.columns import Ints
from manta.workers.constraints import Constraints
from manta.workers.draws import uniform
from manta.workers.filters import drop_below, top_k_cutoff, top_p_cutoff
from manta.workers.grammar_masks import GrammarMasks
from manta.workers.penalties import apply_penalties, mask_stop_tokens
from manta.workers.records import StepOutput
from manta.workers.sampling_table import SamplingTable
from manta.workers.scorer import Scorer
from manta.workers.slot_table import Rows
from manta.workers.token_table import TokenTable
from manta.workers.transfer import upload


class Sampler:
    """Batched over rows. A row's token depends on its own logits, parameters, seed and position, on no other row."""

    def __init__(self, table: SamplingTable, tokens: TokenTable) -> None:
        self._table = table
        self._tokens = tokens
        self._constraints = Constraints(table.constraints, tokens)
        self._grammars = GrammarMasks(table.grammars, tokens)
        self._row_sampler = ops.make_row_sampler(tokens.ids.device)

    def begin(self, rows: Rows) -> None:
        """Before the layers of a step whose tokens are chosen here. Waits for nothing."""
        self._grammars.begin(rows.sampled_slots, rows.sampled_positions)

    def sample_rows(self, logits: Tensor, rows: Rows, scorer: Scorer, output: StepOutput) -> tuple[Tensor, StepOutput]:
        """As `sample`, for the rows of a step that sample; and the step's `output` with their tokens, and with
        log-probabilities for those that ask behind the records that it has."""
        slots, positions = rows.sampled_slots, rows.sampled_positions
        asking = scorer.asking(slots)
        if asking is None:
            tokens = self.sample(logits, slots, positions)
            return tokens, StepOutput(tokens, output.records, output.vectors)
        index, num_best = asking
        (on_device,) = upload([index], logits.device)
        is_as_said = index.size == slots.size and not self._table.changes_logits(slots)
        said = logits if is_as_said else logits[on_device]  # what the model said
        tokens = self.sample(logits, slots, positions)
        scored = scorer.of_sampled(said, tokens[on_device], rows.sampled[index], num_best)
        return tokens, StepOutput(tokens, [*output.records, scored], output.vectors)

    def sample(self, logits: Tensor, slots: Ints, positions: Ints) -> Tensor:
        """Token ids int64 [N], on the device.

        logits float32 [N, vocab], which this overwrites; row i belongs to slots[i] and chooses the token at
        positions[i] of its sequence (both on the host). Where slots have grammars, `begin` must have come before.
        """
        table = self._table
        if table.constraints:
            self._constraints.apply(logits, slots, positions)
        if table.grammars:
            self._grammars.apply(logits, slots, table.min_tokens)
        if self._row_sampler is None:
            return self._sample_in_torch(logits, slots, positions)
        if not (table.temperature[slots].any() or table.penalised[slots].any() or table.min_tokens[slots].any()):
            return ops.argmax(logits)
        return self._row_sampler(logits, slots, positions, table, self._tokens.ids)

    def _sample_in_torch(self, logits: Tensor, slots: Ints, positions: Ints) -> Tensor:
        """The same in operations that run on any device."""
        table = self._table
        mask_stop_tokens(logits, table, slots, positions)
        apply_penalties(logits, table, self._tokens, slots, positions)
        rows = np.flatnonzero(table.temperature[slots])
        if not rows.size:
            return ops.argmax(logits)
        if rows.size == slots.size:
            return self._draw(logits, slots, positions)
        tokens = ops.argmax(logits)
        (index,) = upload([rows], logits.device)
        tokens[index] = self._draw(logits[index], slots[rows], positions[rows])
        return tokens

    def _draw(self, logits: Tensor, slots: Ints, positions: Ints) -> Tensor:
        """Token ids int64 [R] of the rows that do not take the best token."""
        draws = uniform(self._table.seed[slots], positions)
        temperature, draw = upload([self._table.temperature[slots].astype(np.float64), draws], logits.device)
        x = logits / temperature.to(torch.float32)[:, None]
        weights = x.sub_(x.amax(dim=-1, keepdim=True)).exp_()
        self._filter(weights, slots)
        # Inverse of the cumulative distribution, in the order of token ids: the first token whose cumulative weight
        # exceeds the draw. Such a token has a weight above 0. The clamp is for rows of NaN, whose index would be no
        # token and would take the whole device down.
        cumulative = torch.cumsum(weights, dim=-1, dtype=torch.float64)
        target = draw[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=weights.shape[1] - 1)

    def _filter(self, weights: Tensor, slots: Ints) -> None:
        """Sets the weights float32 [R, vocab] of tokens that may not be drawn to 0, in place."""
        table, device = self._table, weights.device
        min_p, top_k, top_p = table.min_p[slots], table.top_k[slots], table.top_p[slots]
        rows = np.flatnonzero(top_k)
        if min_p.any() or rows.size:
            # Nguyen et al., "Min-p sampling" (2024): relative to the best token, whose weight is 1.
            cutoff = upload([min_p], device)[0].clone()
            if rows.size:
                index, k = upload([rows, top_k[rows]], device)
                kth = top_k_cutoff(weights[index], k, int(top_k.max()))
                cutoff[index] = torch.maximum(cutoff[index], kth)
            drop_below(weights, cutoff)
        rows = np.flatnonzero(top_p < 1.0)
        if rows.size:
            (index,) = upload([rows], device)
            cutoff = weights.new_zeros(slots.size)
            cutoff[index] = top_p_cutoff(weights[index], upload([top_p[rows]], device)[0])
            drop_below(weights, cutoff)
