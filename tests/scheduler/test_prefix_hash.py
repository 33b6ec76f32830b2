"""Hashes of blocks against the sum in the module's docstring, done in Python's own integers."""

import numpy as np
import pytest
from numpy.typing import NDArray

from manta.scheduler.prefix import HASH_BYTES, LANES, PrefixHasher, root_hash

BLOCK_SIZE = 3
ROOT = root_hash(b"", "")


def tokens(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def expected(hasher: PrefixHasher, root: bytes, ids: list[int]) -> bytes:
    """The hash of the last block of `ids`, a whole number of blocks."""
    sums = []
    for lane in range(LANES):
        total = int.from_bytes(root[8 * lane : 8 * lane + 8], "little")
        for position, token in enumerate(ids):
            total += int(hasher._keys[position // BLOCK_SIZE, lane, position % BLOCK_SIZE]) * (token + 1)
        sums.append(total % 2**64)
    return b"".join(value.to_bytes(8, "little") for value in sums)


@pytest.mark.parametrize("root", [ROOT, root_hash(b"salt", "adapter")])
def test_hashes_are_the_sums_over_all_tokens_before(root: bytes) -> None:
    hasher = PrefixHasher(20, BLOCK_SIZE)
    ids = [0, 2**31 - 1, 5, 7, 7, 0, 1, 2, 3, 4, 4]
    hashes: list[bytes] = []
    hasher.extend(hashes, root, np.array(ids[:6], np.int32))
    hasher.extend(hashes, root, np.array(ids[6:], np.int32))  # the last block is not full
    assert hashes == [expected(hasher, root, ids[:end]) for end in (3, 6, 9)]
    assert {len(each) for each in hashes} == {HASH_BYTES}
    hasher.extend(hashes, root, tokens())
    assert len(hashes) == 3


def test_one_block_of_several_sequences() -> None:
    hasher = PrefixHasher(20, BLOCK_SIZE)
    ids = [9, 8, 7, 6, 5, 4]
    hashes: list[bytes] = []
    hasher.extend(hashes, ROOT, np.array(ids, np.int32))
    blocks = np.array([[6, 5, 4], [1, 2, 3], [0, 0, 0]], np.int32)
    followers = hasher.next_hashes([hashes[0], hashes[1], ROOT], [1, 2, 0], blocks)
    assert followers[0] == hashes[1]
    assert followers[1] == expected(hasher, ROOT, [*ids, 1, 2, 3])
    assert followers[2] == expected(hasher, ROOT, [0, 0, 0])


def test_texts_that_differ_have_other_hashes() -> None:
    hasher = PrefixHasher(12, BLOCK_SIZE)
    texts = [(0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0), (0, 0, 0, 0, 0, 0), (1, 0, 0, 0, 0, 0), (0, 0, 0, 1, 0, 0)]
    seen = set()
    for root in (ROOT, root_hash(b"a", "")):
        for text in texts:
            hashes: list[bytes] = []
            hasher.extend(hashes, root, tokens(*text))
            seen.add(hashes[-1])
    assert len(seen) == 2 * len(texts)


def test_keys_are_secret() -> None:
    """Another process, another hash: who knows one of them knows nothing of the other."""
    hashes: list[list[bytes]] = [[], []]
    for each in hashes:
        PrefixHasher(12, BLOCK_SIZE).extend(each, ROOT, tokens(1, 2, 3))
    assert hashes[0] != hashes[1]
