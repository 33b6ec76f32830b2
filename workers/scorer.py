"""Log-probabilities of the tokens that requests ask about: those that a step samples, and those of prompts.

Both are of the model's own logits, before anything in a request's sampling changes them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from manta.kernels import ops
from manta.workers.columns import Ints
from manta.workers.records import Records
from manta.workers.sampling_table import SamplingTable
from manta.workers.slot_table import Rows
from manta.workers.token_table import TokenTable
from manta.workers.transfer import upload

MAX_SCORED_ROWS = 256  # rows of logits at a time, whatever the prompt: 128 MiB of a vocabulary of 131,072
MAX_HOST_ROWS = 96  # where the host computes, for which more are no faster


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """S tokens of a step after which a prompt goes on with a token that somebody asks about."""

    rows: Ints  # int64 [S]: the step's rows, ascending
    tokens: Ints  # int64 [S]: which of the step's T tokens
    slots: Ints  # int64 [S]
    positions: Ints  # int64 [S]: where the token asked about stands, one behind
    num_best: Ints  # int64 [S]


class Scorer:
    """Reads what slots ask for from the table. `max_rows`: of logits at a time. `is_output_rank`: whether anybody hears
    of it; the other ranks of the stage take part in computing logits, no more."""

    def __init__(self, table: SamplingTable, tokens: TokenTable, max_rows: int, is_output_rank: bool = True) -> None:
        self._table = table
        self._tokens = tokens
        self._max_rows = min(max_rows, MAX_SCORED_ROWS)
        self._is_output_rank = is_output_rank

    def prompt_tokens(self, rows: Rows) -> PromptTokens | None:
        """None where nobody asks. What follows the prompt's last token is sampled, so that one is not among them."""
        asked = self._table.num_prompt_logprobs
        if not asked:
            return None
        first = np.cumsum(rows.num_tokens) - rows.num_tokens
        parts: list[list[Ints]] = [[], [], [], [], []]
        for row in range(rows.num_decodes, rows.slots.size):
            slot = int(rows.slots[row])
            num_best = asked.get(slot)
            if num_best is None:
                continue
            last = int(self._table.num_prompt_tokens[slot]) - 1
            offsets = np.arange(min(int(rows.num_tokens[row]), last - int(rows.starts[row])))
            if offsets.size:
                columns = (row, first[row] + offsets, slot, rows.starts[row] + offsets + 1, num_best)
                for part, column in zip(parts, columns, strict=True):
                    part.append(np.broadcast_to(np.asarray(column, np.int64), offsets.shape))
        return PromptTokens(*map(np.concatenate, parts)) if parts[0] else None

    def of_prompts(self, asked: PromptTokens, hidden: Tensor, logits_of: Callable[[Tensor], Tensor]) -> list[Records]:
        """hidden: [T, size], of all tokens of the step; logits_of: [R, size] -> float32 [R, vocab]. A few rows at a
        time. A collective like `logits_of`: every rank of the stage calls it."""
        records = []
        for begin in range(0, asked.tokens.size, self._max_rows):
            part = slice(begin, begin + self._max_rows)
            index, slots, positions = upload(
                [asked.tokens[part], asked.slots[part], asked.positions[part]], hidden.device
            )
            logits = logits_of(hidden[index])
            if self._is_output_rank:
                tokens = self._tokens.gather(slots, positions)
                records.append(self._records(logits, tokens, asked.rows[part], asked.num_best[part]))
        return records

    def asking(self, slots: Ints) -> tuple[Ints, Ints] | None:
        """Which rows of a step's sampling slots [N] ask about their token, int64 [M], and of how many others they want
        to know; None where nobody does."""
        asked = self._table.num_logprobs
        if not asked or not self._is_output_rank:
            return None
        found = [(row, asked[slot]) for row, slot in enumerate(slots.tolist()) if slot in asked]
        if not found:
            return None
        index, num_best = np.array(found, np.int64).T
        return index, num_best

    def of_sampled(self, logits: Tensor, tokens: Tensor, rows: Ints, num_best: Ints) -> Records:
        """logits: float32 [M, vocab], of the model; tokens: int64 [M]; rows: the step's rows."""
        return self._records(logits, tokens, rows, num_best)

    def _records(self, logits: Tensor, tokens: Tensor, rows: Ints, num_best: Ints) -> Records:
        num_best = np.minimum(num_best, logits.shape[1])
        return Records(rows, num_best, *ops.logprobs(logits, tokens, int(num_best.max()))).download()
