"""From texts that must not be generated to the token sequences that write them."""

from collections.abc import Sequence

from manta.cluster.doors.text import Tokenizer


def tokenize_bad_words(words: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Each word as the tokenizer writes it at the beginning of a text, and as it does behind a space."""
    sequences: list[list[int]] = []
    for word in words:
        alone = tokenizer.encode(word.lstrip(), add_special_tokens=False)
        spaced = tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
        sequences += [ids for ids in (alone, spaced) if ids and ids not in sequences]
    return sequences
