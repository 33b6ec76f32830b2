"""Beam search over the continuations that workers report: which beams go on, which hypotheses have ended, and when no
better one can come.

The rules are those of `generate(num_beams=...)` in Hugging Face transformers 5 (`_beam_search`): of all continuations
of all beams the `width` best may end, and the `width` best that do not end go on. A hypothesis is ranked by its
cumulative log-probability divided by (number of generated tokens) ** length_penalty.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from manta.scheduler.types import Tokens


@dataclass(frozen=True, slots=True)
class BeamParams:
    """`num_candidates` of the best tokens are known of each beam: enough are width + the number of tokens that end."""

    width: int
    num_candidates: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False  # True: once `width` hypotheses have ended; False: when a heuristic
    # says that none will be better; "never": when none can be
    end_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Row:
    """What a step says of one beam."""

    tokens: Tokens  # prompt and output
    cumulative_logprob: float  # of the output
    ids: NDArray[np.int32]  # [num_candidates], best first
    logprobs: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Continuation:
    parent: int  # index among the rows
    token: int
    cumulative_logprob: float


@dataclass(frozen=True, slots=True)
class Hypothesis:
    tokens: Tokens  # the output, with the token that ended it
    cumulative_logprob: float
    score: float
    end_token: int | None  # None: it has all the tokens it may have


@dataclass(slots=True)
class BeamSearch:
    """One search: `advance` is called once per step until `is_over`."""

    params: BeamParams
    num_prompt_tokens: int
    max_length: int  # prompt and output
    min_tokens: int = 0  # no hypothesis with fewer tokens, the last one not counted
    hypotheses: list[Hypothesis] = field(default_factory=list)  # `width` at most, best first
    is_over: bool = False

    def advance(self, rows: list[Row]) -> list[Continuation]:
        """The beams of the next step, best first; none when the search is over. All rows have the same length."""
        width = self.params.width
        num_output = len(rows[0].tokens) + 1 - self.num_prompt_tokens
        is_last = len(rows[0].tokens) + 1 >= self.max_length
        ended: list[Continuation] = []
        running: list[Continuation] = []
        for place, candidate in enumerate(self._best(rows, num_output)):
            if is_last or candidate.token in self.params.end_token_ids:
                if place < width:
                    ended.append(candidate)
            elif len(running) < width:
                running.append(candidate)
        new = [self._hypothesis(rows[each.parent], each, num_output) for each in ended]
        merged = sorted(self.hypotheses + new, key=lambda each: each.score, reverse=True)
        self.hypotheses = merged[:width]
        self.is_over = not running or self._is_decided(running[0].cumulative_logprob, num_output)
        return [] if self.is_over else running

    def _best(self, rows: list[Row], num_output: int) -> list[Continuation]:
        """All candidates that may be chosen, best first."""
        num_ids = len(rows[0].ids)
        scores = np.array([row.cumulative_logprob for row in rows])[:, None] + [row.logprobs for row in rows]
        ids = np.concatenate([row.ids for row in rows])
        order = np.argsort(-scores.ravel(), kind="stable")
        ends = np.isin(ids, list(self.params.end_token_ids))
        if num_output <= self.min_tokens:
            order = order[~ends[order]]
        order = order[: self.params.width + int(ends.sum())]
        columns = zip((order // num_ids).tolist(), ids[order].tolist(), scores.ravel()[order].tolist(), strict=True)
        return [Continuation(*column) for column in columns]

    def _hypothesis(self, row: Row, last: Continuation, num_output: int) -> Hypothesis:
        tokens = np.append(row.tokens[self.num_prompt_tokens :], np.int32(last.token))
        score: float = last.cumulative_logprob / num_output**self.params.length_penalty
        end_token = last.token if last.token in self.params.end_token_ids else None
        return Hypothesis(tokens, last.cumulative_logprob, score, end_token)

    def _is_decided(self, best_running: float, num_output: int) -> bool:
        """Whether the best beam cannot, or is not expected to, end among the hypotheses there are."""
        params = self.params
        if len(self.hypotheses) < params.width:
            return False
        if params.early_stopping is True:
            return True
        if params.early_stopping == "never" and params.length_penalty > 0:
            num_output = self.max_length - self.num_prompt_tokens
        best_score: float = best_running / num_output**params.length_penalty
        return best_score <= self.hypotheses[-1].score
