"""Token ids of every slot, where the next step's inputs and the penalties read them."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manta.workers.transfer import upload

MIN_SLOTS = 16
MIN_LENGTH = 256


class TokenTable:
    """Token ids by slot and position, on the device: sampled tokens go in without the host seeing them.

    Grows by doubling in both directions; what was never written is 0. A table as large as it will ever be needed never
    moves.
    """

    def __init__(self, device: torch.device, num_slots: int = MIN_SLOTS, length: int = MIN_LENGTH) -> None:
        self._ids = torch.zeros(num_slots, length, dtype=torch.int32, device=device)

    @property
    def ids(self) -> Tensor:
        """int32 [slots, length], for those that read in place; until the next `reserve`."""
        return self._ids

    def reserve(self, num_slots: int, length: int) -> None:
        """Makes room for `num_slots` slots of `length` tokens."""
        old_slots, old_length = self._ids.shape
        if num_slots <= old_slots and length <= old_length:
            return
        shape = (_doubled(old_slots, num_slots), _doubled(old_length, length))
        ids = torch.zeros(shape, dtype=torch.int32, device=self._ids.device)
        ids[:old_slots, :old_length] = self._ids
        self._ids = ids

    def write(self, slot: int, tokens: NDArray[np.int32]) -> None:
        """Puts tokens [n] at positions 0 : n of the slot."""
        (ids,) = upload([tokens], self._ids.device)
        self._ids[slot, : tokens.size] = ids

    def put(self, slots: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Puts token i (int64 [n]) at positions[i] of slots[i] (both int64 [n])."""
        self._ids[slots, positions] = tokens.to(torch.int32)

    def gather(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Token ids int64 [n] at positions[i] of slots[i]."""
        return self._ids[slots, positions].to(torch.int64)

    def first(self, slots: Tensor, length: int) -> Tensor:
        """int64 [n, length]: positions 0 : length of the slots; what lies behind a sequence's end is any valid id."""
        return self._ids[slots, :length].to(torch.int64)


def _doubled(size: int, needed: int) -> int:
    while size < needed:
        size *= 2
    return size
