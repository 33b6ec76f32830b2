"""Names for KV blocks: equal names mean equal content, whoever computed it.

The hash of a sequence's block covers every token up to the block's end, and whom the block may be shared with:

    root(salt, adapter) + sum of key[t] * (token[t] + 1) over all t up to the block's end,  modulo 2**64

in LANES lanes, with a secret random key for every position and lane. If two texts differ at position t, their sums
agree for at most one in 2**33 values of key[t], whatever the other keys are: the factor of key[t] is less than 2**32.
The lanes are independent, so two texts have the same hash with a probability of at most 2**-132 (universal hashing:
Carter and Wegman, "Universal Classes of Hash Functions", 1979). Keys and hashes never leave the process: nobody can
write a prompt that hits another's blocks. A sum, because numpy takes many blocks at once: a third of the time that a
BLAKE2b per block needs.
"""

import os
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from manta.scheduler.types import Tokens

LANES = 4
HASH_BYTES = 8 * LANES


def root_hash(salt: bytes, adapter: str) -> bytes:
    """What the sums of a sequence start from. The salt's length keeps ("a", "bc") and ("ab", "c") apart."""
    return blake2b(len(salt).to_bytes(8, "little") + salt + adapter.encode(), digest_size=HASH_BYTES).digest()


class PrefixHasher:
    """Holds the keys: 32 bytes per position. Hashes of different hashers have nothing to do with each other."""

    def __init__(self, max_num_tokens: int, block_size: int) -> None:
        num_blocks = max_num_tokens // block_size
        keys = np.frombuffer(os.urandom(num_blocks * block_size * HASH_BYTES), np.uint64)
        self._keys = keys.reshape(num_blocks, LANES, block_size)
        self._block_size = block_size

    def extend(self, hashes: list[bytes], root: bytes, tokens: Tokens) -> None:
        """`hashes` are of a sequence's first blocks, `tokens` follow; appends a hash for each full block of these."""
        first, num_blocks = len(hashes), len(tokens) // self._block_size
        blocks = tokens[: num_blocks * self._block_size].reshape(num_blocks, self._block_size)
        sums = self._sums(self._keys[first : first + num_blocks], blocks)
        sums[:1] += np.frombuffer(hashes[-1] if hashes else root, np.uint64)
        hashes += _as_bytes(sums.cumsum(axis=0))

    def next_hashes(self, parents: list[bytes], indices: list[int], blocks: Tokens) -> list[bytes]:
        """One hash for each sequence: of its block number indices[i] with tokens blocks[i], int32 [N, block_size].
        Its parent is the hash of the block before, or the root."""
        sums = self._sums(self._keys[indices], blocks)
        sums += np.frombuffer(b"".join(parents), np.uint64).reshape(-1, LANES)
        return _as_bytes(sums)

    @staticmethod
    def _sums(keys: NDArray[np.uint64], blocks: Tokens) -> NDArray[np.uint64]:
        """keys uint64 [N, LANES, block_size], blocks int32 [N, block_size] -> uint64 [N, LANES]."""
        values = blocks.astype(np.uint64)
        values += 1
        sums: NDArray[np.uint64] = (keys @ values[:, :, None])[:, :, 0]
        return sums


def _as_bytes(sums: NDArray[np.uint64]) -> list[bytes]:
    rows: list[bytes] = sums.view(f"V{HASH_BYTES}")[:, 0].tolist()
    return rows
