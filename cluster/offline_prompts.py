"""The prompts of `LLM.generate`: the forms they may have, their tokens, and what is wrong with them."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any

from manta.cluster.engine.outputs import RequestMetrics, RequestOutput
from manta.cluster.engine.types import num_prompt_tokens_kept
from manta.cluster.offline import OfflineEngine
from manta.configs.sampling import SamplingParams

Prompt = str | Sequence[int] | dict[str, Any]
Params = SamplingParams | Iterable[SamplingParams]  # for all prompts, or one each
ADDS_SPECIAL_TOKENS = "add_special_tokens"  # of a prompt that is a dict
SPECIAL_TOKENS = 8  # more than any tokenizer adds to a text


def as_prompts(prompts: Prompt | Iterable[Prompt]) -> Iterator[Prompt] | list[Prompt]:
    """A single prompt is a batch of one; a list of integers is a single prompt. An iterator stays one."""
    if isinstance(prompts, str | dict):
        return [prompts]
    if isinstance(prompts, Iterator):
        return prompts
    listed: list[Any] = list(prompts)
    if listed and not isinstance(listed[0], str | dict | Sequence) and not hasattr(listed[0], "__len__"):
        return [listed]
    return listed


def paired(prompts: Iterable[Prompt], params: Params) -> Iterator[tuple[Prompt, SamplingParams]]:
    """Raises ValueError, at the end, when there are more of one than of the other."""
    if isinstance(params, SamplingParams):
        return zip(prompts, repeat(params))
    return zip(prompts, params, strict=True)


class PromptReader:
    """Knows the tokenizer and the context length of one engine."""

    def __init__(self, offline: OfflineEngine) -> None:
        self._offline = offline
        self._max_model_len = offline.limits.max_model_len

    def check(self, prompts: Sequence[Prompt], params: Params) -> None:
        """Finds what is wrong with one of many prompts before any runs. Texts too short to be too long, which most are,
        need no tokenizer for that. Raises ValueError."""
        longest = (self._max_model_len - SPECIAL_TOKENS) // 4  # characters: at most four bytes, and a token for each
        is_one = isinstance(params, SamplingParams)
        if not is_one and not isinstance(params, Sequence):
            return  # of an iterator it is not known yet
        for index, (prompt, sampling) in enumerate(paired(prompts, params)):
            text = prompt
            if isinstance(prompt, dict) and prompt.get("prompt_token_ids") is None:
                text = prompt.get("prompt", "")
            if isinstance(text, str) and 0 < len(text) < longest and self._offline.tokenizer is not None:
                continue
            self.output_of(prompt, index, sampling)

    def output_of(self, prompt: Prompt, index: int, sampling: SamplingParams) -> RequestOutput:
        """An output without completions yet, with the prompt's tokens. Raises ValueError naming the prompt's index."""
        text, ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
        adds_special_tokens = True
        if isinstance(prompt, dict):
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            adds_special_tokens = prompt.get(ADDS_SPECIAL_TOKENS, True)
            if ids is None and text is None:
                raise ValueError(f"prompt {index} is a dict with neither 'prompt' nor 'prompt_token_ids'")
        if ids is None:
            ids = self._offline.text_tokenizer().encode(str(text), adds_special_tokens)
        else:
            ids = [int(token) for token in ids]
        keep = num_prompt_tokens_kept(sampling, self._max_model_len)
        ids = ids if keep is None else ids[-keep:]
        if not ids:
            raise ValueError(f"prompt {index} has no tokens")
        if len(ids) >= self._max_model_len:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens; with max_model_len={self._max_model_len} at most "
                f"{self._max_model_len - 1} leave room for an output"
            )
        return RequestOutput("", text, ids, [], RequestMetrics(0.0))
