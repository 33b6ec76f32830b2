"""Turns generated tokens into text one at a time, without ever giving out half a character."""

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from manta.cluster.doors.text import Tokenizer

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6  # prompt tokens decoded along, so that a leading space of the first generated word survives
MAX_HELD_TOKENS = 8  # a character is 4 bytes at most, so a longer run of bytes is no character and may go out


class Detokenizer(Protocol):
    """Text of one request's tokens. All deltas and the flush together are the decoding of all tokens."""

    def push(self, token_id: int) -> str:
        """The new text, "" while a character is incomplete or a special token is left out."""
        ...

    def flush(self) -> str:
        """The rest at the end, incomplete characters as U+FFFD."""
        ...


class ByteDetokenizer:
    """For byte-level vocabularies: every token is a fixed run of bytes, whatever is around it."""

    def __init__(self, tokenizer: "Tokenizer", hidden_ids: frozenset[int]) -> None:
        self._token_bytes = tokenizer.token_bytes(hidden_ids)
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def push(self, token_id: int) -> str:
        return self._decode(self._token_bytes[token_id])

    def flush(self) -> str:
        return self._decode(b"", True)


class WindowDetokenizer:
    """For all other vocabularies, where the text of a token depends on its neighbours (spaces, byte fallback).

    Decodes the tokens since the last sure border twice, with and without the newest ones: the difference is new text.
    """

    def __init__(self, tokenizer: "Tokenizer", hidden_ids: frozenset[int], prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._hidden_ids = hidden_ids
        context = [int(token) for token in prompt_token_ids[-CONTEXT_TOKENS:]]
        self._window = [token for token in context if token not in hidden_ids]
        self._num_read = len(self._window)  # tokens of the window whose text went out
        self._read_text = self._decode(self._window)

    def push(self, token_id: int) -> str:
        if token_id in self._hidden_ids:
            return ""  # kept out of the window, which would grow with them
        self._window.append(token_id)
        text = self._decode(self._window)
        num_held = len(self._window) - self._num_read
        if text.endswith(REPLACEMENT) and num_held < MAX_HELD_TOKENS:
            return ""
        delta = text[len(self._read_text) :]
        if delta:
            del self._window[: self._num_read]
            self._num_read = len(self._window)
            self._read_text = self._decode(self._window)
        return delta

    def flush(self) -> str:
        return self._decode(self._window)[len(self._read_text) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids)


def new_detokenizer(
    tokenizer: "Tokenizer",
    skip_special_tokens: bool = True,
    prompt_token_ids: Sequence[int] = (),
    visible: frozenset[str] = frozenset(),
) -> Detokenizer:
    """The detokenizer that fits the vocabulary. `visible` are texts of special tokens that are never left out."""
    hidden_ids = tokenizer.hidden_ids(skip_special_tokens, visible)
    if tokenizer.is_byte_level:
        return ByteDetokenizer(tokenizer, hidden_ids)
    return WindowDetokenizer(tokenizer, hidden_ids, prompt_token_ids)
