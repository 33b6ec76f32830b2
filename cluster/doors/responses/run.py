"""One response in the making: its object, its output and its events."""

import asyncio
import logging
import time
from typing import Any

from manta.cluster.doors.answer import AnswerPlan
from manta.cluster.doors.errors import Kind, RequestError, from_engine, internal
from manta.cluster.doors.output import Delta
from manta.cluster.doors.responses.events import EventWriter
from manta.cluster.doors.responses.output import OutputItems
from manta.cluster.doors.responses.reading import AnswerReading
from manta.cluster.doors.service import Service
from manta.cluster.doors.usage import Usage
from manta.cluster.doors.validate import Resolved
from manta.cluster.engine.client import EngineError

logger = logging.getLogger("manta.doors")


class Run:
    """Turns the tokens of one call into the response object and, if `tells`, into events.

    It ends once: completed, incomplete, cancelled or failed.
    """

    def __init__(
        self,
        service: Service,
        response_id: str,
        told: dict[str, Any],
        resolved: Resolved,
        plan: AnswerPlan,
        *,
        tells: bool,
        is_background: bool,
    ) -> None:
        """`told`: what of the request the response object tells again."""
        self.id = response_id
        self.is_background = is_background
        self.resolved = resolved
        self.begun = asyncio.Event()  # there is a token, or the end
        self.ended = asyncio.Event()
        self.refusal: RequestError | None = None  # why it ended without a token
        self._model = service.config.model_name
        self._events = EventWriter() if tells else None
        self._usage = Usage(resolved)
        self._items = OutputItems(self._events.write if self._events else None)
        self._reading = AnswerReading(plan, resolved, service.validator.tokenizer, self._items)
        sampling = resolved.requests[0].sampling
        self._told = told | {"temperature": sampling.temperature, "top_p": sampling.top_p}
        self._created_s = int(time.time())
        self._status = "queued" if is_background else "in_progress"
        self._end: dict[str, Any] = {"completed_at": None, "error": None, "incomplete_details": None, "usage": None}

    def body(self) -> dict[str, Any]:
        """The response object as it is now. It shares the items with the run: encode it before the run goes on."""
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created_s,
            "status": self._status,
            "model": self._model,
            "output": self._items.items(),
            **self._told,
            **self._end,
        }

    def opening(self) -> list[bytes]:
        """The events before the first token."""
        self._tell("response.created")
        self._tell(f"response.{self._status}")
        return self.take_events()

    def take_events(self) -> list[bytes]:
        """Those since the last time."""
        return self._events.take() if self._events is not None else []

    def push(self, delta: Delta) -> None:
        if not self.begun.is_set():
            self.begun.set()
            if self._status == "queued":
                self._status = "in_progress"
                self._tell("response.in_progress")
        self._usage.add(0, delta)
        self._reading.push(delta)
        if delta.finish_reason == "length":
            self._finish("incomplete", incomplete_details={"reason": "max_output_tokens"})
        elif delta.finish_reason == "abort":
            self._finish("cancelled")
        elif delta.finish_reason is not None:
            self._finish("completed", completed_at=int(time.time()))

    def fail(self, error: Exception) -> None:
        """Ends it with an error, unless it has ended."""
        if self.ended.is_set():
            return
        if isinstance(error, EngineError):
            error = from_engine(error)
        elif not isinstance(error, RequestError):
            logger.error("response %s failed", self.id, exc_info=error)
            error = internal(error)
        if not self.begun.is_set():
            self.refusal = error
        code = "rate_limit_exceeded" if error.kind is Kind.OVERLOADED else "server_error"
        self._finish("failed", error={"code": code, "message": error.message})

    def give_up(self) -> None:
        """Ends it because nobody waits for it any more, unless it has ended."""
        if not self.ended.is_set():
            self._finish("cancelled")

    def _finish(self, status: str, **details: Any) -> None:
        is_whole = status == "completed"
        if is_whole or status == "incomplete" or self._items.items():
            self._items.end("completed" if is_whole else "incomplete")
        self._status = status
        self._end |= details | {"usage": self._usage_body()}
        self._tell(f"response.{status}" if status in ("completed", "failed") else "response.incomplete")
        self.begun.set()
        self.ended.set()

    def _tell(self, kind: str) -> None:
        if self._events is not None:
            self._events.write(kind, {"response": self.body()})

    def _usage_body(self) -> dict[str, Any]:
        counts = self._usage.counts()
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": counts["cached_tokens"], "cache_write_tokens": 0},
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._reading.num_reasoning_tokens()},
            "total_tokens": counts["prompt_tokens"] + counts["completion_tokens"],
        }
