"""Reads one streamed answer of an OpenAI-compatible server into the record of its request."""

from dataclasses import dataclass, field
from typing import Any

import orjson

from manta.cluster.bench.sse import EventParser

_MAX_ERROR_BYTES = 4096


@dataclass(slots=True)
class Record:
    """What is known of one request. Times are time.perf_counter(), in seconds.

    A chunk is an event that carries new output; `chunk_times_s` has one entry for each.
    """

    prompt_len: int  # as it was sent; the server's own count replaces it
    wanted_output_len: int
    due_s: float = 0.0  # when it should be sent: at its arrival, or when --max-concurrency let it go
    queue_s: float = 0.0  # how long --max-concurrency held it back
    start_s: float = 0.0
    end_s: float | None = None  # the last chunk or finish_reason; None while the answer is not complete
    chunk_times_s: list[float] = field(default_factory=list)
    output_len: int = 0  # generated tokens; of `usage`, else the number of chunks
    num_cached_tokens: int | None = None  # of the prompt, where the server tells
    has_usage: bool = False
    finish_reason: str = ""
    status: int = 0  # of HTTP
    error: str = ""
    text: str = ""

    @property
    def is_success(self) -> bool:
        return self.end_s is not None and not self.error

    @property
    def latency_s(self) -> float:
        assert self.end_s is not None
        return self.end_s - self.start_s

    @property
    def ttft_s(self) -> float:
        """Time to the first chunk; of an answer without any output, to its end."""
        return self.chunk_times_s[0] - self.start_s if self.chunk_times_s else self.latency_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None where there is only one."""
        return (self.latency_s - self.ttft_s) / (self.output_len - 1) if self.output_len > 1 else None


class AnswerReader:
    """The Receiver of one answer: fills `record` as events come. Call `close` when the answer is complete."""

    def __init__(self, record: Record, is_chat: bool, keeps_text: bool = False) -> None:
        self._record = record
        self._piece_of = _chat_piece if is_chat else _completion_piece
        self._keeps_text = keeps_text
        self._events = EventParser()
        self._body = bytearray()  # of an error, or of an answer that is no stream
        self._last_s: float | None = None
        self._is_done = False
        self._pieces: list[str] = []

    def on_start(self, status: int) -> None:
        self._record.status = status

    def on_body(self, piece: bytes, now_s: float) -> None:
        if self._last_s is None:  # it may turn out to be no stream at all
            self._body += piece[: _MAX_ERROR_BYTES - len(self._body)]
        if self._record.status == 200:
            for event in self._events.feed(piece):
                self._take(event, now_s)

    def close(self, now_s: float) -> None:
        """Decides whether the answer was good; says in `record.error` why not."""
        record = self._record
        if self._record.status == 200:
            for event in self._events.close():
                self._take(event, now_s)
        if record.error:
            return
        if record.status != 200:
            record.error = f"HTTP {record.status}: {error_message(bytes(self._body))}"
        elif self._last_s is None:
            record.error = f"the answer held no event with choices: {error_message(bytes(self._body))}"
        elif not record.finish_reason and not self._is_done:
            record.error = "the stream ended without a finish_reason or [DONE]"
        else:
            record.end_s = self._last_s
            record.text = "".join(self._pieces)
            if not record.has_usage:
                record.output_len = len(record.chunk_times_s)

    def _take(self, event: bytes, now_s: float) -> None:
        if event == b"[DONE]":
            self._is_done = True
            return
        try:
            chunk = orjson.loads(event)
            if "error" in chunk:
                self._record.error = self._record.error or f"in the stream: {error_message(event)}"
                return
            if choices := chunk.get("choices"):
                self._take_choices(choices, now_s)
            if usage := chunk.get("usage"):
                self._take_usage(usage)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            self._record.error = f"an event that is no chunk ({error!r}): {event[:200].decode(errors='replace')}"

    def _take_choices(self, choices: list[dict[str, Any]], now_s: float) -> None:
        self._last_s = now_s
        has_output = False
        for choice in choices:
            piece = self._piece_of(choice)
            if piece or choice.get("token_ids"):
                has_output = True
                if self._keeps_text:
                    self._pieces.append(piece)
            if reason := choice.get("finish_reason"):
                self._record.finish_reason = reason
        if has_output:
            self._record.chunk_times_s.append(now_s)

    def _take_usage(self, usage: dict[str, Any]) -> None:
        record = self._record
        if (completion_tokens := usage.get("completion_tokens")) is not None:
            record.output_len = int(completion_tokens)
            record.has_usage = True
        if (prompt_tokens := usage.get("prompt_tokens")) is not None:
            record.prompt_len = int(prompt_tokens)
        if (details := usage.get("prompt_tokens_details")) and details.get("cached_tokens") is not None:
            record.num_cached_tokens = int(details["cached_tokens"])


def error_message(body: bytes) -> str:
    """The server's own words in an error body of OpenAI's form, else the start of the body; one line."""
    text = body.decode(errors="replace")
    try:
        value = orjson.loads(body)
        error = value.get("error", value)
        text = str(error.get("message") or error) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:300] or "an empty body"


def _completion_piece(choice: dict[str, Any]) -> str:
    return choice.get("text") or ""


def _chat_piece(choice: dict[str, Any]) -> str:
    """What a user would see grow: the content, the reasoning before it, or the arguments of a tool call."""
    delta = choice.get("delta") or {}
    piece = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
    if not piece and (calls := delta.get("tool_calls")):
        return "".join(str((call.get("function") or {}).get("arguments") or " ") for call in calls)
    return str(piece)
