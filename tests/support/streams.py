"""Streams of a running server, all at once, and what came of them."""

import json
import threading
from dataclasses import dataclass
from typing import Any

import httpx

from tests.support.server import DEMO_MODEL

Ended = tuple[str, list[float], list[str]]  # a completion's text, its log-probabilities and how it ended

GREEDY = {"model": str(DEMO_MODEL), "temperature": 0, "max_tokens": 400, "ignore_eos": True, "stream": True}
SEEDED = {**GREEDY, "temperature": 1.0, "seed": 5}


@dataclass
class _Stream:
    body: dict[str, Any]
    status: int
    events: list[dict[str, Any]]
    is_over: bool = False
    broke: str = ""


class Streams:
    """Begins all bodies at once, each as a stream of /v1/completions."""

    def __init__(self, url: str, bodies: list[dict[str, Any]]) -> None:
        self._url = url
        self._streams = [_Stream(body, 0, []) for body in bodies]
        self._threads = [threading.Thread(target=self._read, args=(stream,)) for stream in self._streams]
        for thread in self._threads:
            thread.start()

    @property
    def num_events(self) -> int:
        """Of the slowest stream."""
        return min(len(stream.events) for stream in self._streams)

    @property
    def most_events(self) -> int:
        """Of the fastest stream."""
        return max(len(stream.events) for stream in self._streams)

    def result(self) -> list[dict[int, Ended]]:
        """Per body and completion. Every stream must have ended well."""
        for stream in self._wait():
            assert stream.status == 200
            assert not stream.broke, stream.broke
            assert stream.is_over, "a stream ended without [DONE]"
        return [_completions(stream.events) for stream in self._streams]

    def result_of_unbroken(self) -> list[dict[int, Ended] | None]:
        """As `result`; None where the connection broke."""
        return [None if stream.broke else _completions(stream.events) for stream in self._wait()]

    def _wait(self) -> list[_Stream]:
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a stream hangs"
        return self._streams

    def _read(self, stream: _Stream) -> None:
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=stream.body, timeout=100) as response:
                stream.status = response.status_code
                for line in response.iter_lines():
                    data = line.removeprefix("data: ")
                    if data == "[DONE]":
                        stream.is_over = True
                    elif data:
                        stream.events.append(json.loads(data))
        except httpx.TransportError as error:
            stream.broke = repr(error)


def _completions(events: list[dict[str, Any]]) -> dict[int, Ended]:
    texts: dict[int, str] = {}
    logprobs: dict[int, list[float]] = {}
    reasons: dict[int, list[str]] = {}
    for event in events:
        assert "error" not in event, event
        for choice in event["choices"]:
            index = choice["index"]
            texts[index] = texts.get(index, "") + choice["text"]
            logprobs.setdefault(index, []).extend((choice.get("logprobs") or {}).get("token_logprobs") or [])
            reasons.setdefault(index, []).extend([choice["finish_reason"]] if choice["finish_reason"] else [])
    return {index: (texts[index], [round(x, 3) for x in logprobs[index]], reasons[index]) for index in texts}
