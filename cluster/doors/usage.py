"""Counts the tokens that a call used."""

from typing import Any

from manta.cluster.doors.output import Delta
from manta.cluster.doors.validate import Resolved


class Usage:
    """Token counts of one call. A prompt counts once, however many completions it has."""

    def __init__(self, resolved: Resolved) -> None:
        self._n = resolved.n
        self._num_prompt_tokens = resolved.num_prompt_tokens
        self._num_cached_tokens = [0] * len(resolved.prompts)
        self._num_completion_tokens = 0

    def add(self, index: int, delta: Delta) -> None:
        self._num_completion_tokens += len(delta.token_ids)
        if delta.num_cached_tokens and index % self._n == 0:
            self._num_cached_tokens[index // self._n] = delta.num_cached_tokens

    def counts(self) -> dict[str, int]:
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "cached_tokens": sum(self._num_cached_tokens),
        }

    def body(self) -> dict[str, Any]:
        """The `usage` object of the OpenAI API."""
        counts = self.counts()
        return {
            "prompt_tokens": counts["prompt_tokens"],
            "completion_tokens": counts["completion_tokens"],
            "total_tokens": counts["prompt_tokens"] + counts["completion_tokens"],
            "prompt_tokens_details": {"cached_tokens": counts["cached_tokens"]},
        }
