"""Names for KV blocks: equal names mean equal content, whoever computed it.

A block's hash covers its own tokens and its parent's hash, hence every token before it; the first parent covers salt
and adapter, hence whom the block may be shared with. BLAKE2b, so that no prompt can be made to hit another's blocks.
"""

from hashlib import blake2b

HASH_BYTES = 16


def root_hash(salt: bytes, adapter: str) -> bytes:
    """The parent of a sequence's first block. The salt's length keeps ("a", "bc") and ("ab", "c") apart."""
    return blake2b(len(salt).to_bytes(8, "little") + salt + adapter.encode(), digest_size=HASH_BYTES).digest()


def extend_chain(hashes: list[bytes], root: bytes, tokens: bytes, block_bytes: int) -> None:
    """Appends to `hashes` one hash per full block in `tokens` (int32 ids as bytes), which follow those in `hashes`."""
    parent = hashes[-1] if hashes else root
    for start in range(0, len(tokens), block_bytes):
        parent = blake2b(parent + tokens[start : start + block_bytes], digest_size=HASH_BYTES).digest()
        hashes.append(parent)
