"""Text to tokens and back: the tokenizer of the served model, with the parts of it that the doors use."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from manta.configs.schema import ServeConfig


class TokenizerError(ValueError):
    """The tokenizer or the chat template cannot be loaded; the message says which one and why."""


class TokenBytes(dict[int, bytes]):
    """Token id -> the bytes it stands for in a byte-level vocabulary; filled as tokens are met."""

    def __init__(self, backend: Any, skipped_ids: frozenset[int]) -> None:
        super().__init__(dict.fromkeys(skipped_ids, b""))
        self._backend = backend

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) or ""  # ids that only pad the embedding have no text
        try:
            value = bytes(_BYTE_OF[character] for character in token)
        except KeyError:  # an added token: its characters stand for themselves
            value = token.encode()
        self[token_id] = value
        return value


def _byte_of_character() -> dict[str, int]:
    """The printable characters that byte-level BPE writes bytes with (GPT-2): most stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of_character()


class Tokenizer:
    """Wraps a Hugging Face tokenizer. Safe to call from several threads.

    `chat_template` replaces the tokenizer's own; None keeps it.
    """

    def __init__(self, hf_tokenizer: Any, chat_template: str | None = None) -> None:
        self.hf = hf_tokenizer
        self.chat_template: str | None = chat_template or _template(hf_tokenizer, "default")
        # Some models have another template for prompts with tools.
        self.tool_template: str | None = chat_template or _template(hf_tokenizer, "tool_use") or self.chat_template
        self._backend = hf_tokenizer.backend_tokenizer if hf_tokenizer.is_fast else None
        if self._backend is not None:
            # Set once here, so that encoding never changes the shared tokenizer while another thread uses it.
            self._backend.no_truncation()
            self._backend.no_padding()
        self._token_bytes: dict[frozenset[int], TokenBytes] = {}
        self._hidden_ids: dict[frozenset[str], frozenset[int]] = {}
        self._texts: dict[int, str] = {}
        # The longest token as the vocabulary writes it. Here, not on first use: a large vocabulary takes 0.1 s.
        self.max_token_characters: int = max(len(token) for token in hf_tokenizer.get_vocab())

    @property
    def takes_tools(self) -> bool:
        """A prompt can tell the model of tools."""
        return self.tool_template is not None and "tools" in self.tool_template

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out of text."""
        if self._backend is None:
            return frozenset(self.hf.all_special_ids)
        return frozenset(id for id, token in self._backend.get_added_tokens_decoder().items() if token.special)

    def hidden_ids(self, skip_special_tokens: bool, visible: frozenset[str] = frozenset()) -> frozenset[int]:
        """Ids that are left out of text: the special ones, but for those that stand for the `visible` texts."""
        if not skip_special_tokens:
            return frozenset()
        if visible not in self._hidden_ids:
            ids = list(self.special_ids)
            tokens = zip(ids, self.tokens(ids), strict=True)
            self._hidden_ids[visible] = frozenset(id for id, token in tokens if token not in visible)
        return self._hidden_ids[visible]

    @cached_property
    def is_byte_level(self) -> bool:
        """Every token is a fixed run of bytes (GPT-2, Llama 3, Qwen), so that decoding is concatenation."""
        return self._backend is not None and type(self._backend.decoder).__name__ == "ByteLevel"

    def encode(self, text: str, add_special_tokens: bool = True, most: int | None = None) -> list[int]:
        """With `most`: the text's first tokens, so many that with the special ones there are no more."""
        if self._backend is None:
            cut = {"truncation": most is not None, "max_length": most}
            return list(self.hf.encode(text, add_special_tokens=add_special_tokens, **cut))
        # Of the backend's calls only those for batches let other threads run meanwhile.
        adds_now = add_special_tokens and most is None
        encoding = self._backend.encode_batch_fast([text], add_special_tokens=adds_now)[0]
        if most is not None:
            num_special = self._backend.num_special_tokens_to_add(False) if add_special_tokens else 0
            encoding.truncate(max(most - num_special, 0))
            encoding = self._backend.post_process(encoding, None, add_special_tokens)
        ids: list[int] = encoding.ids[:most]
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        if self._backend is not None:
            return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))
        text = self.hf.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return str(text)

    def tokens(self, token_ids: Sequence[int]) -> list[str]:
        """The tokens as the vocabulary writes them; "" for an id without one."""
        return [token or "" for token in self.hf.convert_ids_to_tokens(list(token_ids))]

    def token_text(self, token_id: int) -> str:
        """The text of a token by itself, a space before it included; what is no whole character as U+FFFD."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._token_text(token_id)
        return text

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token stands for."""
        if self.is_byte_level:
            return self.token_bytes()[token_id]
        (token,) = self.tokens([token_id])
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # byte fallback
            return bytes([int(token[3:5], 16)])
        return self.token_text(token_id).encode()

    def _token_text(self, token_id: int) -> str:
        if self.is_byte_level:
            return self.token_bytes()[token_id].decode(errors="replace")
        text = self.decode([token_id])
        (token,) = self.tokens([token_id])
        # Decoders drop the space that SentencePiece writes before the first word of a text.
        return " " + text if token.startswith("\u2581") and not text.startswith(" ") else text

    def token_bytes(self, hidden_ids: frozenset[int] = frozenset()) -> TokenBytes:
        """Bytes per token id, for byte-level vocabularies only; one table per set of hidden ids for all requests."""
        if hidden_ids not in self._token_bytes:
            self._token_bytes[hidden_ids] = TokenBytes(self._backend, hidden_ids)
        return self._token_bytes[hidden_ids]


def load_tokenizer(config: ServeConfig) -> Tokenizer:
    """The configured model's tokenizer, with `config.chat_template` (a file or the text). Raises TokenizerError."""
    from transformers import AutoTokenizer  # takes seconds and brings torch along

    name = config.tokenizer or config.model
    try:
        hf_tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise TokenizerError(f"no tokenizer can be loaded from {name!r} (set tokenizer to another one): {reason}")
    return Tokenizer(hf_tokenizer, _read_template(config.chat_template))


def _read_template(template: str | None) -> str | None:
    if template is None or "{" in template or "\n" in template:
        return template
    path = Path(template)
    if not path.is_file():
        raise TokenizerError(f"chat_template {template!r} is neither a file nor a jinja template")
    return path.read_text(encoding="utf-8")


def _template(hf_tokenizer: Any, name: str) -> str | None:
    template: Any = hf_tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get(name)
    return None if template is None else str(template)
