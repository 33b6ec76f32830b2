"""Which tokens the grammars of sequences allow next.

A sequence's matcher follows the tokens that the token table holds of it, so that it does not matter how they came
there: sampled by the step before, or sent along with a sequence that was preempted. Reading them is the only moment at
which a GPU worker waits for tokens, and only in steps with such a sequence: the copy to the host is launched before the
step's layers, and while these run, the host finds out what may follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manta.workers.columns import Ints
from manta.workers.token_table import TokenTable
from manta.workers.transfer import download, upload

if TYPE_CHECKING:
    import xgrammar as xgr

_BITS = 32
_ROWS_AT_ONCE = 32  # on a GPU: bits take 4 bytes each while they are read, which the trial at start does not know


class SlotGrammar:
    """One sequence on its way through its grammar."""

    def __init__(
        self, compiled: "xgr.CompiledGrammar", num_prompt_tokens: int, stop_token_ids: Sequence[int], vocab_size: int
    ) -> None:
        """stop_token_ids: those that end the request. The model's own end the grammar too, if they do not end the
        request: they are then all that comes."""
        import xgrammar as xgr

        ends = sorted({*stop_token_ids, *compiled.tokenizer_info.stop_token_ids})
        self.position = num_prompt_tokens  # of the next token that the matcher has not seen
        self._matcher = xgr.GrammarMatcher(compiled, override_stop_tokens=ends)
        self._has_ended = False
        self._only_ends = np.zeros(-(-vocab_size // _BITS), np.uint32)
        for token in ends:
            self._only_ends[token // _BITS] |= np.uint32(1 << token % _BITS)

    def advance(self, tokens: Sequence[int]) -> None:
        """These follow what the matcher has seen. One that the grammar does not allow, which can only come of another
        constraint that left nothing else, ends it."""
        self.position += len(tokens)
        for token in tokens:
            if self._has_ended:
                return
            self._has_ended = not self._matcher.accept_token(token) or self._matcher.is_terminated()

    def fill(self, mask: Tensor, row: int) -> bool:
        """Writes the bits of the tokens that may follow to mask[row], int32 [rows, words] in host memory. Returns
        whether these only end the text."""
        bits = mask[row].numpy().view(np.uint32)
        if not self._has_ended:
            self._matcher.fill_next_token_bitmask(mask, row)
        if self._has_ended or not bits.any():
            bits[:] = self._only_ends
            return True
        return not (bits & ~self._only_ends).any()


@dataclass(frozen=True, slots=True)
class Reading:
    """Tokens on their way to the host that matchers have not seen yet, one after the other."""

    slots: list[int]
    counts: list[int]  # tokens of each slot
    tokens: Tensor  # int64 [sum of counts]
    copied: "torch.cuda.Event | None"

    def wait(self) -> NDArray[np.int64]:
        if self.copied is not None:
            self.copied.synchronize()
        tokens: NDArray[np.int64] = self.tokens.numpy()
        return tokens


class GrammarMasks:
    """Applies the grammars of slots. `by_slot` and `min_tokens` belong to the sampling table."""

    def __init__(self, by_slot: dict[int, SlotGrammar], tokens: TokenTable) -> None:
        self._by_slot = by_slot
        self._tokens = tokens
        self._reading: Reading | None = None

    def begin(self, slots: Ints, positions: Ints) -> None:
        """Before the layers of a step in which these slots [N] sample the tokens at these positions [N]: launches the
        copy of tokens that matchers have not seen."""
        if not self._by_slot:
            return
        found = [
            (slot, self._by_slot[slot].position, position)
            for slot, position in zip(slots.tolist(), positions.tolist(), strict=True)
            if slot in self._by_slot and self._by_slot[slot].position < position
        ]
        self._reading = None
        if not found:
            return
        counts = [end - begin for _, begin, end in found]
        device = self._tokens.ids.device
        columns = [
            np.repeat(np.array([slot for slot, *_ in found], np.int64), counts),
            np.concatenate([np.arange(begin, end) for _, begin, end in found]),
        ]
        tokens = download(self._tokens.gather(*upload(columns, device)))
        copied = None
        if device.type == "cuda":
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._reading = Reading([slot for slot, *_ in found], counts, tokens, copied)

    def apply(self, logits: Tensor, slots: Ints, min_tokens: Ints) -> bool:
        """Sets the logits float32 [N, vocab] of tokens that may not follow to -inf, in place; row i belongs to
        slots[i], as in `begin`. Where only the end may follow, min_tokens [slots] becomes 0. Returns whether any row
        has a grammar."""
        rows = [(row, slot) for row, slot in enumerate(slots.tolist()) if slot in self._by_slot]
        if not rows:
            return False
        self._advance()
        words = -(-logits.shape[1] // _BITS)
        mask = torch.empty(len(rows), words, dtype=torch.int32)
        for index, (_, slot) in enumerate(rows):
            if self._by_slot[slot].fill(mask, index):
                min_tokens[slot] = 0
        apply_mask(logits, np.array([row for row, _ in rows], np.int64), mask)
        return True

    def _advance(self) -> None:
        reading, self._reading = self._reading, None
        if reading is None:
            return
        tokens, end = reading.wait(), 0
        for slot, count in zip(reading.slots, reading.counts, strict=True):
            end += count
            self._by_slot[slot].advance(tokens[end - count : end].tolist())


def apply_mask(logits: Tensor, rows: Ints, mask: Tensor) -> None:
    """Sets logits[rows[i], t] to -inf, in place, where bit t % 32 of mask[i, t // 32] is 0.

    logits: float32 [N, vocab]; rows: int64 [R], distinct; mask: int32 [R, ceil(vocab / 32)], in host memory.
    """
    vocab_size = logits.shape[1]
    if logits.device.type == "cpu":
        bits = np.unpackbits(mask.numpy().view(np.uint8), axis=1, count=vocab_size, bitorder="little")
        for row, allowed in zip(rows.tolist(), torch.from_numpy(bits), strict=True):
            logits[row].masked_fill_(allowed == 0, -torch.inf)
        return
    index, words = upload([rows], logits.device)[0], upload([mask.numpy()], logits.device)[0]
    shifts = torch.arange(_BITS, dtype=torch.int32, device=logits.device)
    for start in range(0, len(index), _ROWS_AT_ONCE):
        some, of_some = index[start : start + _ROWS_AT_ONCE], words[start : start + _ROWS_AT_ONCE]
        allowed = ((of_some[:, :, None] >> shifts) & 1).view(len(some), -1)[:, :vocab_size].bool()
        logits[some] = torch.where(allowed, logits[some], -torch.inf)
