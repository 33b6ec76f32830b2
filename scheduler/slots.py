"""Slots of one replica: who has which, and the tokens of everyone who has one."""

from collections import deque

import numpy as np
from numpy.typing import NDArray

from manta.scheduler.sequence import Sequence
from manta.scheduler.types import Tokens, record_bytes

_FIRST_WIDTH = 256


class SlotTable:
    """`tokens` is int32 [max_num_seqs, width]; row s holds the known tokens of the sequence in slot s. It widens when
    a longer sequence comes, so that it stays small where the context is long and sequences are not. The width is a
    whole number of blocks."""

    def __init__(self, max_num_seqs: int, block_size: int) -> None:
        self.sequences: list[Sequence | None] = [None] * max_num_seqs
        self.record_bytes = [0] * max_num_seqs  # of the record with each token; stays until the slot is taken again
        self.tokens = np.zeros((max_num_seqs, -(-_FIRST_WIDTH // block_size) * block_size), np.int32)
        self._block_size = block_size
        self.free = list(range(max_num_seqs - 1, -1, -1))  # a stack
        self.limbo: deque[tuple[int, int]] = deque()  # (step that must be answered first, slot), by step

    def take(self, sequence: Sequence) -> int:
        """A slot for the sequence, its tokens written; `widen` has been called for its blocks."""
        slot = self.free.pop()
        self.sequences[slot] = sequence
        self.record_bytes[slot] = record_bytes(sequence.request.num_logprobs)
        self.tokens[slot, : len(sequence.tokens)] = sequence.tokens
        return slot

    def put(self, slots: NDArray[np.int64], positions: NDArray[np.int64], tokens: Tokens) -> None:
        """tokens[i] is at positions[i] of slots[i]."""
        # One index into the flat array costs half of what a pair of indices does.
        self.tokens.reshape(-1).put(slots * self.tokens.shape[1] + positions, tokens)

    def blocks(self, slots: list[int], indices: list[int]) -> Tokens:
        """int32 [N, block_size]: tokens of block indices[i] of slots[i]."""
        blocks: Tokens = self.tokens.reshape(len(self.sequences), -1, self._block_size)[slots, indices]
        return blocks

    def at(self, slot: int) -> Sequence:
        """The sequence in an occupied slot."""
        sequence = self.sequences[slot]
        assert sequence is not None, f"slot {slot} is empty"
        return sequence

    def release(self, slot: int, until: int | None) -> None:
        """The slot may be taken again once step `until` is answered; at once if it is None."""
        self.sequences[slot] = None
        if until is None:
            self.free.append(slot)
        else:
            self.limbo.append((until, slot))

    def confirm(self, step: int) -> None:
        """`step` and all before it are answered."""
        while self.limbo and self.limbo[0][0] <= step:
            self.free.append(self.limbo.popleft()[1])

    def widen(self, num_tokens: int) -> None:
        """Rows hold at least `num_tokens` tokens from here on."""
        width = self.tokens.shape[1]
        if num_tokens > width:
            while width < num_tokens:
                width *= 2
            wider = np.zeros((len(self.sequences), width), np.int32)
            wider[:, : self.tokens.shape[1]] = self.tokens
            self.tokens = wider
