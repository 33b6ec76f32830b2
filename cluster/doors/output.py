"""One request's way back from tokens to text: detokenize, find stop strings, say why it ended."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from manta.cluster.doors.detokenize import new_detokenizer
from manta.cluster.doors.stops import StopStrings
from manta.cluster.doors.text import Tokenizer
from manta.cluster.engine.client import TokenChunk
from manta.cluster.engine.logprobs import Records, no_records, read_records
from manta.configs.sampling import SamplingParams


@dataclass(slots=True)
class Delta:
    """What is new of one completion; the last one has a finish_reason."""

    text: str
    token_ids: list[int]
    finish_reason: str | None = None  # "stop", "length", "abort"
    stop_reason: str | int | None = None  # the stop string or stop token id of the request that ended it
    num_cached_tokens: int = 0
    logprobs: Records | None = None  # of the token_ids, where asked for
    offsets: list[int] = field(default_factory=list)  # beside logprobs: characters of the text before each token
    prompt_logprobs: Records | None = None  # in the first delta, where asked for: of the prompt's second token on


def without_output(delta: Delta) -> Delta:
    """The delta of a request that was only to read its prompt."""
    logprobs = None if delta.logprobs is None else no_records()
    reason = delta.finish_reason if delta.finish_reason in (None, "abort") else "length"
    return replace(delta, text="", token_ids=[], finish_reason=reason, stop_reason=None, logprobs=logprobs, offsets=[])


def joined(first: Delta, second: Delta) -> Delta:
    """Two deltas of one completion, one behind the other."""
    logprobs = first.logprobs or second.logprobs
    if first.logprobs is not None and second.logprobs is not None:
        first.logprobs.extend(second.logprobs)
    return Delta(
        first.text + second.text,
        first.token_ids + second.token_ids,
        second.finish_reason,
        second.stop_reason,
        max(first.num_cached_tokens, second.num_cached_tokens),
        logprobs,
        first.offsets + second.offsets,
        first.prompt_logprobs or second.prompt_logprobs,
    )


class OutputText:
    """Turns the token chunks of one request into deltas.

    The text never ends inside a character or inside what may become a stop string. A stop token is counted and listed
    among the token ids but not written, unless `include_stop_str_in_output`. Stop strings do not count before
    `min_tokens`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        prompt_token_ids: Sequence[int] = (),
        visible_tokens: frozenset[str] = frozenset(),
    ) -> None:
        """`visible_tokens` are texts of special tokens that stay in the text even with skip_special_tokens."""
        self.num_tokens = 0
        skips = sampling.skip_special_tokens
        self._detokenizer = new_detokenizer(tokenizer, skips, prompt_token_ids, visible_tokens)
        self._stops = StopStrings(sampling.stop, sampling.include_stop_str_in_output) if sampling.stop else None
        self._min_tokens = sampling.min_tokens
        self._stop_token_ids = frozenset(sampling.stop_token_ids)
        self._writes_stop_token = sampling.include_stop_str_in_output
        self._num_logprobs, self._num_prompt_logprobs = sampling.logprobs, sampling.prompt_logprobs
        self._num_characters = 0
        self._is_first = True

    def push(self, chunk: TokenChunk) -> Delta:
        """The delta of one chunk. Its finish_reason may be "stop" where the chunk has none: a stop string is complete,
        and the caller ends the request."""
        if self._num_logprobs is None and self._num_prompt_logprobs is None:
            return self._push(chunk, None)
        offsets: list[int] = []
        delta = self._push(chunk, offsets)
        if self._num_logprobs is not None:
            records = read_records(chunk.logprobs, self._num_logprobs)
            delta.logprobs, delta.offsets = records.first(len(delta.token_ids)), offsets
        if self._num_prompt_logprobs is not None and self._is_first:
            delta.prompt_logprobs = read_records(chunk.prompt_logprobs, self._num_prompt_logprobs)
        self._is_first = False
        return delta

    def _push(self, chunk: TokenChunk, offsets: list[int] | None) -> Delta:
        """Appends to `offsets`, if given, where each token begins."""
        token_ids = chunk.token_ids
        text = ""
        for index, token_id in enumerate(token_ids):
            self.num_tokens += 1
            if offsets is not None:
                offsets.append(self._num_characters)
            is_last = index == len(token_ids) - 1
            if is_last and token_id == chunk.stop_token and chunk.finish_reason and not self._writes_stop_token:
                break
            new = self._detokenizer.push(token_id)
            self._num_characters += len(new)
            text += self._through_stops(new)
            if self._stops is not None and self._stops.matched is not None:
                kept = token_ids[: index + 1]
                return Delta(text, kept, "stop", self._stops.matched, chunk.num_cached_tokens)
        if chunk.finish_reason is None:
            return Delta(text, token_ids, num_cached_tokens=chunk.num_cached_tokens)
        return self._finish(text, chunk)

    def abort(self) -> Delta:
        """The last delta of a request that was ended from outside."""
        delta = self._finish("", TokenChunk([], "abort"))
        delta.logprobs = None if self._num_logprobs is None else no_records()
        return delta

    def _finish(self, text: str, chunk: TokenChunk) -> Delta:
        text += self._through_stops(self._detokenizer.flush())
        finish_reason = chunk.finish_reason
        stop_reason: str | int | None = None
        if self._stops is not None:
            text += self._stops.flush()
            if self._stops.matched is not None:
                finish_reason, stop_reason = "stop", self._stops.matched
        if stop_reason is None and chunk.stop_token in self._stop_token_ids:
            stop_reason = chunk.stop_token
        return Delta(text, chunk.token_ids, finish_reason, stop_reason, chunk.num_cached_tokens)

    def _through_stops(self, text: str) -> str:
        if self._stops is None or not text or self.num_tokens <= self._min_tokens:
            return text
        return self._stops.push(text)
