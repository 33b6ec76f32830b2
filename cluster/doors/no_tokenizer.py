"""What stands for the tokenizer where there is none: prompts are token ids, texts stay empty."""

from collections import defaultdict
from collections.abc import Sequence

from manta.cluster.doors.errors import RequestError
from manta.cluster.doors.text import TokenBytes, Tokenizer


class NoTokenizer(Tokenizer):
    """Every token writes nothing. `encode` raises RequestError."""

    is_byte_level = True
    special_ids = frozenset()

    def __init__(self) -> None:
        self.chat_template = self.tool_template = None
        self.max_token_characters = 2**31
        self._nothing: defaultdict[int, bytes] = defaultdict(bytes)

    def encode(self, text: str, add_special_tokens: bool = True, most: int | None = None) -> list[int]:
        raise RequestError("texts need a tokenizer; skip_tokenizer_init=True leaves only token ids", "prompt")

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return ""

    def tokens(self, token_ids: Sequence[int]) -> list[str]:
        return [""] * len(token_ids)

    def hidden_ids(self, skip_special_tokens: bool, visible: frozenset[str] = frozenset()) -> frozenset[int]:
        return frozenset()

    def token_bytes(self, hidden_ids: frozenset[int] = frozenset()) -> TokenBytes:
        return self._nothing  # type: ignore[return-value]
