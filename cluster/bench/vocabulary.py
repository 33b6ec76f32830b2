"""Which token ids prompts may be made of, and text that has a wanted number of tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from manta.cluster.bench.errors import BenchError

_FIT_ATTEMPTS = 10


class PromptTokenizer:
    """A fast tokenizer without the libraries around it: loading transformers takes seconds and 300 MB."""

    def __init__(self, backend: Tokenizer, name: str) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend: Any = backend
        self.name = name

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(token_ids), skip_special_tokens=False))

    def plain_ids(self) -> np.ndarray:
        """int32 [num_ids], ascending: every id but those of added tokens, which templates and servers give meaning."""
        added = self._backend.get_added_tokens_decoder().keys()
        return np.array(sorted(set(self._backend.get_vocab().values()) - set(added)), np.int32)


def load_prompt_tokenizer(name: str, trust_remote_code: bool = False) -> PromptTokenizer:
    """From a folder with tokenizer.json, or whatever transformers finds under the name. Raises BenchError."""
    file = Path(name).expanduser() / "tokenizer.json"
    if name.startswith((".", "/", "~")) and not file.parent.is_dir():
        raise BenchError(f"there is no tokenizer folder {name!r}")
    try:
        if file.is_file():
            return PromptTokenizer(Tokenizer.from_file(str(file)), name)
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # noqa: BLE001 - tokenizers raises bare Exception, transformers nearly everything
        raise BenchError(f"no tokenizer can be loaded from {name!r}: {' '.join(str(error).split())[:300]}") from None
    if not loaded.is_fast:
        raise BenchError(f"the tokenizer {name!r} has no fast form (tokenizer.json); name another one with --tokenizer")
    return PromptTokenizer(loaded.backend_tokenizer, name)


def fit_text(
    tokenizer: PromptTokenizer,
    token_ids: np.ndarray,
    fillers: np.ndarray,
    add_special_tokens: bool,
    rng: np.random.Generator,
) -> tuple[str, int]:
    """Text made of `token_ids` that has as many tokens, and how many it really has.

    Tokens that are put side by side may merge or split when they are read again. Only the end of the text makes up for
    that, by tokens left out or added from `fillers`, so that equal leading ids stay equal leading text.
    `add_special_tokens` counts those of the tokenizer, which the server will add.
    """
    wanted = len(token_ids)
    ids = token_ids.tolist()
    text, length = "", -1
    for _ in range(_FIT_ATTEMPTS):
        candidate = tokenizer.decode(ids)
        read = len(tokenizer.encode(candidate, add_special_tokens))
        if length < 0 or abs(read - wanted) < abs(length - wanted):
            text, length = candidate, read
        if read == wanted:
            break
        if read > wanted:
            ids = ids[: max(1, len(ids) - (read - wanted))]
        else:
            ids += rng.choice(fillers, wanted - read).tolist()
    return text, length
