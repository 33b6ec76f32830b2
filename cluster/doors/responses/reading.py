"""From the deltas of a call to events of its answer, with the log-probabilities of what is said, and counts."""

from collections.abc import Sequence
from typing import Any, Protocol

from manta.cluster.doors.answer import AnswerPlan
from manta.cluster.doors.detokenize import new_detokenizer
from manta.cluster.doors.logprob_format import TokenNames, chat_logprobs
from manta.cluster.doors.output import Delta
from manta.cluster.doors.text import Tokenizer
from manta.cluster.doors.tools.events import Content, Event
from manta.cluster.doors.validate import Resolved


class Growing(Protocol):
    """What an answer becomes."""

    @property
    def says(self) -> bool:
        """More text would belong to the last part."""
        ...

    def push(self, event: Event, logprobs: Sequence[dict[str, Any]] = ()) -> None: ...


class AnswerReading:
    """Reads one answer into `items`."""

    def __init__(self, plan: AnswerPlan, resolved: Resolved, tokenizer: Tokenizer, items: Growing) -> None:
        self._plan, self._resolved, self._tokenizer = plan, resolved, tokenizer
        self._items = items
        self._reader = plan.new_reader() if plan.reads_text else None
        self._names = TokenNames(tokenizer, by_id=False)
        self._token_ids: list[int] = []
        self._text = ""  # only beside log-probabilities: what was not given to the reader
        self._num_characters = 0  # given to the reader
        self._untold: list[tuple[int, dict[str, Any]]] = []  # where tokens begin, and their log-probabilities

    def push(self, delta: Delta) -> None:
        is_last = delta.finish_reason is not None
        if self._reader is None:
            entries = self._entries(delta)
            if delta.text or entries:
                self._items.push(Content(delta.text), entries)
            return
        self._token_ids += delta.token_ids
        if delta.logprobs is None:
            for event in self._reader.push(delta.text, is_last):
                self._items.push(event)
            return
        self._push_by_token(delta, is_last)
        ends = [entry for offset, entry in self._untold if offset >= self._num_characters]
        if is_last and ends and self._items.says:  # tokens that end the text
            self._items.push(Content(""), ends)

    def num_reasoning_tokens(self) -> int:
        """Tokens up to the one that ends the thinking."""
        num_characters = self._reader.num_thought_characters if self._reader is not None else 0
        if not num_characters:
            return 0
        resolved = self._resolved
        sampling = resolved.requests[0].sampling
        detokenizer = new_detokenizer(
            self._tokenizer, sampling.skip_special_tokens, resolved.prompts[0], resolved.visible_tokens
        )
        length = 0
        for count, token in enumerate(self._token_ids, 1):
            length += len(detokenizer.push(token))
            if length >= num_characters:
                return count
        return len(self._token_ids)

    def _entries(self, delta: Delta) -> list[dict[str, Any]]:
        if delta.logprobs is None:
            return []
        entries: list[dict[str, Any]] = chat_logprobs(delta.token_ids, delta.logprobs, self._names)["content"]
        return entries

    def _push_by_token(self, delta: Delta, is_last: bool) -> None:
        """Token by token, so that what is told of each does not depend on how many come at once."""
        self._text += delta.text
        self._untold += zip(delta.offsets, self._entries(delta), strict=True)
        ends = [offset for offset, _ in self._untold if offset > self._num_characters]
        for end in [*ends, None]:
            size = len(self._text) if end is None else end - self._num_characters
            if size > len(self._text) or (end is None and not is_last):
                return  # a stop string may begin here
            text, self._text = self._text[:size], self._text[size:]
            self._num_characters += size
            self._read(text, is_last and end is None)

    def _read(self, text: str, is_last: bool) -> None:
        assert self._reader is not None
        for event in self._reader.push(text, is_last):
            told = self._take(len(event.text)) if isinstance(event, Content) else []
            self._items.push(event, told)

    def _take(self, num_characters: int) -> list[dict[str, Any]]:
        """The log-probabilities of the tokens that the last so many characters read are of."""
        first = self._num_characters - num_characters
        read = [pair for pair in self._untold if pair[0] < self._num_characters]
        self._untold = self._untold[len(read) :]
        start = max((offset for offset, _ in read if offset <= first), default=0)
        return [entry for offset, entry in read if offset >= start]
