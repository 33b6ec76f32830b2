"""Processes of a running server are killed and stopped: what was accepted ends with the tokens it would have had."""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.support.server import DEMO_MODEL, ServerProcess, wait_until

QUICK = ("--kv-cache-memory-bytes", "16MiB", "--max-num-seqs", "8", "--port", "0", "--grpc-port", "0")
LOCAL = (
    str(DEMO_MODEL),
    "--distributed-executor-backend",
    "local",
    "--dtype",
    "float32",
    "--restart-limit",
    "99",
    *QUICK,
)
GREEDY = {"model": str(DEMO_MODEL), "temperature": 0, "max_tokens": 400, "ignore_eos": True, "stream": True}
SEEDED = {**GREEDY, "temperature": 1.0, "seed": 5}
BODIES = [
    *({**GREEDY, "prompt": prompt} for prompt in ("SELECT", "a", "How many users")),
    {**GREEDY, "prompt": "b", "frequency_penalty": 0.5, "logprobs": 2},
    {**SEEDED, "prompt": "c", "n": 2},
    {**SEEDED, "prompt": "d", "stop": ["zzzzzz"], "repetition_penalty": 1.1},
]


class Streams:
    """All bodies at once, each read as a stream."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._events: list[list[object]] = [[] for _ in BODIES]
        self._threads = [threading.Thread(target=self._read, args=(i,)) for i in range(len(BODIES))]
        for thread in self._threads:
            thread.start()

    @property
    def num_events(self) -> int:
        """Of the slowest stream."""
        return min(map(len, self._events))

    def result(self) -> list[dict[int, tuple[str, list[float], list[str]]]]:
        """Per body and completion: its text, its log-probabilities and how it ended."""
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a stream hangs"
        return [_completions(events) for events in self._events]

    def _read(self, index: int) -> None:
        url = f"{self._url}/v1/completions"
        with httpx.stream("POST", url, json=BODIES[index], timeout=100) as response:
            self._events[index].append(response.status_code)
            for line in response.iter_lines():
                if line:
                    self._events[index].append(line)


def _completions(events: list[object]) -> dict[int, tuple[str, list[float], list[str]]]:
    assert events[0] == 200
    assert events[-1] == "data: [DONE]"
    texts: dict[int, str] = {}
    logprobs: dict[int, list[float]] = {}
    reasons: dict[int, list[str]] = {}
    for line in events[1:-1]:
        event = json.loads(str(line).removeprefix("data: "))
        assert "error" not in event, event
        for choice in event["choices"]:
            index = choice["index"]
            texts[index] = texts.get(index, "") + choice["text"]
            logprobs.setdefault(index, []).extend((choice.get("logprobs") or {}).get("token_logprobs") or [])
            reasons.setdefault(index, []).extend([choice["finish_reason"]] if choice["finish_reason"] else [])
    return {index: (texts[index], [round(x, 3) for x in logprobs[index]], reasons[index]) for index in texts}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(*LOCAL).wait_ready() as server:
        yield server
        assert server.interrupt() == 0


@pytest.fixture(scope="module")
def undisturbed(server: ServerProcess) -> list[dict[int, tuple[str, list[float], list[str]]]]:
    return Streams(server.url).result()


def _strike(server: ServerProcess, module: str, number: signal.Signals) -> None:
    pids = [pid for pid, command in server.processes().items() if module in command]
    os.kill(random.Random(0).choice(pids), number)


@pytest.mark.parametrize(
    "strikes",
    [
        [("workers.main", signal.SIGKILL)],
        [("engine.main", signal.SIGKILL)],
        [("engine.main", signal.SIGKILL), ("workers.main", signal.SIGKILL)],
        [("workers.main", signal.SIGSTOP)],
    ],
    ids=["worker killed", "scheduler killed", "both killed", "worker stopped"],
)
def test_streams_go_on(
    strikes: list[tuple[str, signal.Signals]],
    server: ServerProcess,
    undisturbed: list[dict[int, tuple[str, list[float], list[str]]]],
) -> None:
    streams = Streams(server.url)
    wait_until(lambda: streams.num_events > 10, 30, "tokens of every stream")
    for module, number in strikes:
        _strike(server, module, number)
    assert streams.result() == undisturbed
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_frontend_comes_back_on_its_ports(server: ServerProcess) -> None:
    _strike(server, "doors.main", signal.SIGKILL)

    def is_up() -> bool:
        try:
            return httpx.get(f"{server.url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    wait_until(lambda: not is_up(), 10, "its end")
    wait_until(is_up, 60, "its return")
    body = {"model": str(DEMO_MODEL), "prompt": "a", "max_tokens": 5}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200


def test_what_waits_while_nothing_serves_is_answered(server: ServerProcess) -> None:
    """Requests that come after the loss are taken, and /ready says that they have to wait."""
    _strike(server, "workers.main", signal.SIGKILL)
    wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503, 10, "ready turns")
    started_s = time.monotonic()
    body = {"model": str(DEMO_MODEL), "prompt": "a", "max_tokens": 5}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200
    assert time.monotonic() - started_s < 50
