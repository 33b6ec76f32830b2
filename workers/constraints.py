"""Which tokens a request allows, forbids or favours: allowed_token_ids, bad_words, logit_bias, in vLLM's order.

The first and the last change a row by columns that stay the same from step to step. A bad word is a sequence of tokens:
its last one is out where the output so far ends in the others. All rows of a step are changed together, in operations
that run on any device and wait for none.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manta.protos.sampling_pb2 import Sampling
from manta.workers.columns import Ints, PlanError, decode_int32
from manta.workers.token_table import TokenTable
from manta.workers.transfer import upload


@dataclass(frozen=True, slots=True, eq=False)
class Constraint:
    """What one sequence asks for. Ids are of the vocabulary and, but in bad words, distinct."""

    num_prompt_tokens: int
    allowed: Ints  # empty: all
    bad_words: list[Ints]  # none is empty
    bias_ids: Ints
    biases: NDArray[np.float32]

    @classmethod
    def of(cls, slot: int, sampling: Sampling, num_prompt_tokens: int, vocab_size: int) -> Self | None:
        """None where nothing is asked for. Raises PlanError for ids outside the vocabulary."""
        if not (sampling.allowed_token_ids or sampling.bad_words or sampling.bias_token_ids):
            return None

        def ids(data: bytes, name: str) -> Ints:
            column = decode_int32(data, f"slot {slot}: {name}").astype(np.int64)
            if column.size and not 0 <= column.min() <= column.max() < vocab_size:
                raise PlanError(f"slot {slot}: {name} has an id outside the vocabulary of {vocab_size}")
            return column

        allowed = ids(sampling.allowed_token_ids, "allowed_token_ids")
        bias_ids = ids(sampling.bias_token_ids, "bias_token_ids")
        biases = np.frombuffer(sampling.biases, "<f4").astype(np.float32)
        if biases.size != bias_ids.size:
            raise PlanError(f"slot {slot}: {biases.size} biases for {bias_ids.size} tokens")
        bad_words = [ids(word, "bad_words") for word in sampling.bad_words if word]
        return cls(num_prompt_tokens, allowed, bad_words, bias_ids, biases)


Rows = list[tuple[int, int, Constraint]]  # row of the step, its slot, what that asks for


@dataclass(frozen=True, slots=True)
class _Entries:
    """Logits by row and token, both int64 [M]."""

    rows: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, rows: list[int], tokens: list[Ints], device: torch.device) -> Self | None:
        """All of tokens[i] are of rows[i]; None without any."""
        lengths = [len(ids) for ids in tokens]
        if not sum(lengths):
            return None
        return cls(*upload([np.repeat(np.array(rows, np.int64), lengths), np.concatenate(tokens)], device))


@dataclass(frozen=True, slots=True)
class _BadWords:
    """W bad words, of which several may end in one token of one row: E such ends."""

    ends: _Entries  # E
    end_of: Tensor  # int64 [W]
    rows: Tensor  # int64 [W]
    slots: Tensor  # int64 [W]
    first: Tensor  # int64 [W]: position at which the word may begin: the output's first
    lengths: Tensor  # int64 [W]: of the words without their last tokens
    prefixes: Tensor  # int64 [W, L]: the words without their last tokens, right-aligned
    is_used: Tensor  # bool [W, L]

    @classmethod
    def of(cls, rows: Rows, device: torch.device) -> Self | None:
        words = [(row, slot, one.num_prompt_tokens, word) for row, slot, one in rows for word in one.bad_words]
        if not words:
            return None
        longest = max(len(word) for *_, word in words) - 1
        prefixes = np.zeros((len(words), longest), np.int64)
        for prefix, (*_, word) in zip(prefixes, words, strict=True):
            prefix[longest - len(word) + 1 :] = word[:-1]
        keys = np.array([(row, word[-1]) for row, _, _, word in words], np.int64)
        ends, end_of = np.unique(keys, axis=0, return_inverse=True)
        lengths = np.array([len(word) - 1 for *_, word in words], np.int64)
        places = np.arange(longest)[None, :]
        columns = [ends[:, 0], ends[:, 1], end_of.reshape(-1).astype(np.int64), keys[:, 0]]
        columns += [np.array([word[i] for word in words], np.int64) for i in (1, 2)]
        columns += [lengths, prefixes, (places >= longest - lengths[:, None]).astype(np.int64)]
        end_row, end_token, end_of_word, row, slot, first, length, before_last, is_used = upload(
            [np.ascontiguousarray(column) for column in columns], device
        )
        return cls(_Entries(end_row, end_token), end_of_word, row, slot, first, length, before_last, is_used.bool())

    def forbid(self, logits: Tensor, positions: Tensor, tokens: TokenTable) -> None:
        """positions: int64 [N], of the tokens that the rows choose."""
        positions = positions[self.rows]
        longest = self.prefixes.shape[1]
        places = positions[:, None] - longest + torch.arange(longest, device=logits.device)
        said = tokens.gather(self.slots[:, None], places.clamp(min=0))
        matches = ((said == self.prefixes) | ~self.is_used).all(dim=1) & (positions - self.lengths >= self.first)
        num_matches = torch.zeros_like(self.ends.rows).index_add_(0, self.end_of, matches.to(torch.int64))
        x = logits[self.ends.rows, self.ends.tokens]
        logits[self.ends.rows, self.ends.tokens] = torch.where(num_matches > 0, -torch.inf, x)


@dataclass(frozen=True, slots=True)
class _Columns:
    """What the rows of a step ask for, on the device."""

    allowed: _Entries | None
    limited_rows: Tensor  # int64: those that do not allow all tokens
    bad_words: _BadWords | None
    biased: _Entries | None
    biases: Tensor  # float32, beside `biased`

    @classmethod
    def of(cls, rows: Rows, device: torch.device) -> Self:
        numbers = [row for row, _, _ in rows]
        limited = [row for row, _, one in rows if one.allowed.size]
        return cls(
            _Entries.of(numbers, [one.allowed for _, _, one in rows], device),
            upload([np.array(limited, np.int64)], device)[0],
            _BadWords.of(rows, device),
            _Entries.of(numbers, [one.bias_ids for _, _, one in rows], device),
            upload([np.concatenate([one.biases for _, _, one in rows])], device)[0],
        )


class Constraints:
    """Applies the constraints of slots. Keeps what it has sent to the device: a step has mostly the rows of the one
    before. `by_slot` belongs to the sampling table."""

    def __init__(self, by_slot: dict[int, Constraint], tokens: TokenTable) -> None:
        self._by_slot = by_slot
        self._tokens = tokens
        self._rows: Rows = []
        self._columns: _Columns | None = None

    def apply(self, logits: Tensor, slots: Ints, positions: Ints) -> bool:
        """Changes logits float32 [N, vocab] in place; row i belongs to slots[i] and chooses the token at positions[i].
        Returns whether any row asks for anything. A row that allows nothing keeps nothing but -inf."""
        by_slot = self._by_slot
        rows = [(row, slot, by_slot[slot]) for row, slot in enumerate(slots.tolist()) if slot in by_slot]
        if not rows:
            return False
        if self._columns is None or rows != self._rows:
            self._rows, self._columns = rows, _Columns.of(rows, logits.device)
        columns = self._columns
        if columns.allowed is not None:
            rows_of, ids = columns.allowed.rows, columns.allowed.tokens
            kept = logits[rows_of, ids]
            logits[columns.limited_rows] = -torch.inf
            logits[rows_of, ids] = kept
        if columns.bad_words is not None:
            columns.bad_words.forbid(logits, upload([positions], logits.device)[0], self._tokens)
        if columns.biased is not None:
            logits[columns.biased.rows, columns.biased.tokens] += columns.biases
        return True
