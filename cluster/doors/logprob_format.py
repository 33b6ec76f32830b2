"""Log-probabilities as the APIs write them.

JSON has no infinities: what is less probable than e ** -9999 is told as that, as in vLLM.
"""

from collections.abc import Sequence
from typing import Any

from manta.cluster.doors.detokenize import new_detokenizer
from manta.cluster.doors.text import Tokenizer
from manta.cluster.engine.logprobs import Logprob, Records

LEAST = -9999.0


class TokenNames:
    """How tokens are named: by their text, or by their ids (`return_tokens_as_token_ids`)."""

    def __init__(self, tokenizer: Tokenizer, by_id: bool) -> None:
        self.tokenizer = tokenizer
        self._by_id = by_id

    def name(self, token_id: int, prefix: str = "") -> str:
        """What is no whole character is written byte by byte, behind the prefix: \\xf0\\x9f."""
        if self._by_id:
            return f"token_id:{token_id}"
        data = self.tokenizer.bytes_of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return prefix + "".join(f"\\x{byte:02x}" for byte in data)


class CompletionLogprobs:
    """The `logprobs` of a completion: four lists with an entry per token."""

    def __init__(self, names: TokenNames, num_best: int) -> None:
        self._names = names
        self._num_best = num_best
        self.lists: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}

    def add(self, token_ids: Sequence[int], offsets: Sequence[int], records: Records, base: int = 0) -> None:
        """offsets: where in the text the tokens begin, `base` characters further on."""
        lists, names = self.lists, self._names
        lists["text_offset"] += [base + offset for offset in offsets]
        lists["token_logprobs"] += [max(logprob, LEAST) for logprob in records.chosen]
        for token, chosen, ids, best in zip(token_ids, records.chosen, records.best_ids, records.best, strict=True):
            name = names.name(token, "bytes:")
            lists["tokens"].append(name)
            others = zip(ids[: self._num_best], best[: self._num_best], strict=True)
            top: dict[str, float] = {}
            for other, logprob in others:  # of tokens that read the same, the most probable one counts
                top.setdefault(names.name(other, "bytes:"), max(logprob, LEAST))
            top.setdefault(name, max(chosen, LEAST))
            lists["top_logprobs"].append(top)

    def add_prompt(self, token_ids: Sequence[int], records: Records) -> None:
        """Of the prompt's first token nothing is known."""
        detokenizer = new_detokenizer(self._names.tokenizer)
        offsets, end = [], 0
        for token in token_ids:
            offsets.append(end)
            end += len(detokenizer.push(token))
        self.lists["tokens"].append(self._names.name(token_ids[0], "bytes:"))
        self.lists["text_offset"].append(0)
        self.lists["token_logprobs"].append(None)
        self.lists["top_logprobs"].append(None)
        self.add(token_ids[1:], offsets[1:], records)


def chat_logprobs(token_ids: Sequence[int], records: Records, names: TokenNames) -> dict[str, Any]:
    """The `logprobs` of a chat answer, or of a part of it."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = names.tokenizer.bytes_of(token)
        return {"token": names.name(token), "logprob": max(logprob, LEAST), "bytes": list(data)}

    content = [
        entry(token, chosen) | {"top_logprobs": [entry(*other) for other in zip(ids, best, strict=True)]}
        for token, chosen, ids, best in zip(token_ids, records.chosen, records.best_ids, records.best, strict=True)
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    token_ids: list[int], records: Records, tokenizer: Tokenizer, num_best: int
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's `prompt_logprobs`: for each token of the prompt, its own and the most probable ones, by id."""

    def entry(one: Logprob) -> dict[str, Any]:
        return {"logprob": max(one.logprob, LEAST), "rank": one.rank, "decoded_token": one.decoded_token}

    places = records.by_token(token_ids[1:], tokenizer.token_text, num_best)
    return [None, *({str(token): entry(one) for token, one in place.items()} for place in places)]
