"""Processes of a running server are killed and stopped: what was accepted ends with the tokens it would have had."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.support.server import DEMO_MODEL, ServerProcess, wait_until
from tests.support.streams import GREEDY, SEEDED, Ended, Streams

LOCAL = (
    str(DEMO_MODEL), "--distributed-executor-backend", "local", "--dtype", "float32", "--restart-limit", "99",
    "--kv-cache-memory-bytes", "32MiB", "--max-num-seqs", "16", "--max-num-batched-tokens", "64",
    "--api-server-count", "2", "--port", "0", "--grpc-port", "0",
)  # fmt: skip
WORKER, SCHEDULER, FRONTEND = "workers.main", "engine.main", "doors.main"
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
Strike = tuple[str, signal.Signals]
LONG = "SELECT name FROM users; " * 200

DECODING = [
    *({**GREEDY, "prompt": prompt} for prompt in ("SELECT", "a", "How many users")),
    {**GREEDY, "prompt": "b", "frequency_penalty": 0.5, "logprobs": 2},
    {**SEEDED, "prompt": "c", "n": 2},
    {**SEEDED, "prompt": "d", "repetition_penalty": 1.1},
]
VARIED = {**SEEDED, "prompt": "e", "temperature": 1.5, "frequency_penalty": 1.0, "presence_penalty": 0.5}


def _prefilling(salt: str) -> list[dict[str, Any]]:
    """Prompts of 1,400 tokens; another salt, and none of them is cached."""
    return [
        *({**GREEDY, "prompt": f"{number} {LONG}", "max_tokens": 20, "cache_salt": salt} for number in range(3)),
        {**SEEDED, "prompt": f"c {LONG}", "max_tokens": 20, "n": 2, "cache_salt": salt},
    ]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(*LOCAL).wait_ready() as server:
        yield server
        assert server.interrupt() == 0


@pytest.fixture(scope="module")
def decoding(server: ServerProcess) -> list[dict[str, Any]]:
    """Also with a stop string that comes late in the text that it ends."""
    text = Streams(server.url, [VARIED]).result()[0][0][0]
    stop = text[-40:-20]
    assert text.index(stop) > len(text) // 2
    return [*DECODING, {**VARIED, "stop": [stop]}]


@pytest.fixture(scope="module")
def decoded(server: ServerProcess, decoding: list[dict[str, Any]]) -> list[dict[int, Ended]]:
    """Undisturbed."""
    results = Streams(server.url, decoding).result()
    assert results[-1][0][2] == ["stop"]
    return results


@pytest.fixture(scope="module")
def prefilled(server: ServerProcess) -> list[dict[int, Ended]]:
    return Streams(server.url, _prefilling("undisturbed")).result()


def _pids(server: ServerProcess, module: str) -> list[int]:
    return [pid for pid, command in server.processes().items() if module in command]


def _strike(server: ServerProcess, strikes: list[Strike], rng: random.Random) -> None:
    for module, number in strikes:
        os.kill(rng.choice(_pids(server, module)), number)


def _is_ready(server: ServerProcess) -> bool:
    return bool(httpx.get(f"{server.url}/ready").status_code == 200)


@pytest.mark.parametrize(
    "strikes",
    [[(WORKER, KILL)], [(SCHEDULER, KILL)], [(WORKER, STOP)], [(SCHEDULER, KILL), (WORKER, KILL)]],
    ids=["worker killed", "scheduler killed", "worker stopped", "both killed"],
)
def test_streams_go_on(
    strikes: list[Strike],
    server: ServerProcess,
    decoding: list[dict[str, Any]],
    decoded: list[dict[int, Ended]],
) -> None:
    streams = Streams(server.url, decoding)
    wait_until(lambda: streams.num_events > 10, 30, "tokens of every stream")
    _strike(server, strikes, random.Random(0))
    assert streams.result() == decoded
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("seed", range(2))
def test_two_at_once(
    seed: int, server: ServerProcess, decoding: list[dict[str, Any]], decoded: list[dict[int, Ended]]
) -> None:
    """Which, when, and in the midst of what the first one brings about."""
    rng = random.Random(seed)
    strikes: list[Strike] = rng.sample([(WORKER, KILL), (WORKER, STOP), (SCHEDULER, KILL), (SCHEDULER, STOP)], 2)
    print(f"seed {seed}: {strikes}")
    streams = Streams(server.url, decoding)
    wait_until(lambda: streams.most_events > rng.randint(1, 200), 30, "tokens")
    for strike in strikes:
        wait_until(lambda module=strike[0]: _pids(server, module), 10, "somebody to strike")  # type: ignore[misc]
        _strike(server, [strike], rng)
        time.sleep(rng.uniform(0, 1.5))  # not a wait for something: the moment is the test
    assert streams.result() == decoded


@pytest.mark.parametrize("strike", [(WORKER, KILL), (SCHEDULER, KILL)], ids=["worker", "scheduler"])
def test_killed_while_prompts_are_computed(
    strike: Strike, server: ServerProcess, prefilled: list[dict[int, Ended]]
) -> None:
    wait_until(lambda: _is_ready(server), 30, "it is ready")
    streams = Streams(server.url, _prefilling(strike[0]))
    wait_until(lambda: httpx.get(f"{server.url}/load").json()["num_running"] >= 2, 30, "prompts are computed")
    _strike(server, [strike], random.Random(0))
    assert streams.most_events == 0
    assert streams.result() == prefilled


def test_killed_while_the_model_is_loaded_again(
    server: ServerProcess, decoding: list[dict[str, Any]], decoded: list[dict[int, Ended]]
) -> None:
    wait_until(lambda: _is_ready(server), 30, "it is ready")
    streams = Streams(server.url, decoding)
    wait_until(lambda: streams.num_events > 10, 30, "tokens of every stream")
    for delay_s in (0.0, 0.8):
        old = _pids(server, WORKER)
        _strike(server, [(WORKER, KILL)], random.Random(0))
        wait_until(lambda old=old: set(_pids(server, WORKER)) - set(old), 30, "a new worker")  # type: ignore[misc]
        time.sleep(delay_s)  # not a wait for something: the moment is the test
    _strike(server, [(WORKER, KILL)], random.Random(0))
    assert streams.result() == decoded


def test_a_frontend_comes_back_on_its_ports(
    server: ServerProcess, decoding: list[dict[str, Any]], decoded: list[dict[int, Ended]]
) -> None:
    """What ran through the other one goes on."""
    wait_until(lambda: _is_ready(server), 30, "it is ready")
    streams = Streams(server.url, decoding)
    wait_until(lambda: streams.num_events > 10, 30, "tokens of every stream")
    old = _pids(server, FRONTEND)
    _strike(server, [(FRONTEND, KILL)], random.Random(0))
    for ended, expected in zip(streams.result_of_unbroken(), decoded, strict=True):
        assert ended in (None, expected)
    wait_until(lambda: "frontend 0 serves again" in server.output or "frontend 1 serves" in server.output, 60, "a new")
    assert set(_pids(server, FRONTEND)) - set(old)
    wait_until(lambda: httpx.get(f"{server.url}/load").json()["num_running"] == 0, 10, "its requests are aborted")
    assert Streams(server.url, decoding).result() == decoded


def test_what_waits_while_nothing_serves_is_answered(server: ServerProcess) -> None:
    """Requests that come after the loss are taken, and /ready says that they have to wait."""
    wait_until(lambda: _is_ready(server), 30, "it is ready")
    _strike(server, [(WORKER, KILL)], random.Random(0))
    wait_until(lambda: not _is_ready(server), 10, "ready turns")
    body = {"model": str(DEMO_MODEL), "prompt": "a", "max_tokens": 5}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200


def test_a_rolling_restart_fails_no_request(
    server: ServerProcess, decoding: list[dict[str, Any]], decoded: list[dict[int, Ended]]
) -> None:
    """Clients of the openai package that try nothing again, over connections that they keep."""
    wait_until(lambda: _is_ready(server), 30, "it is ready")
    begun, old = len(server.output), set(server.processes()) - {server.pid}
    streams = Streams(server.url, decoding)
    wait_until(lambda: streams.num_events > 10, 30, "tokens of every stream")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=100) as client:
        server.signal(signal.SIGUSR1)
        while "the rolling restart" not in server.output[begun:]:
            answer = client.completions.create(model=str(DEMO_MODEL), prompt="a", max_tokens=5)
            assert answer.usage is not None
    assert "the rolling restart is complete" in server.output[begun:]
    assert streams.result() == decoded
    wait_until(lambda: not old & set(server.processes()), 60, "the end of all old processes")


@pytest.mark.parametrize(
    "moment", [lambda server: True, lambda server: bool(_pids(server, SCHEDULER))], ids=["early", "while it loads"]
)
def test_killed_at_the_first_start(moment: Callable[[ServerProcess], bool]) -> None:
    """Nothing has been accepted: the command ends, says who died, and leaves nothing."""
    with ServerProcess(*LOCAL) as server:
        wait_until(lambda: _pids(server, WORKER) and moment(server), 60, "a worker")
        _strike(server, [(WORKER, KILL)], random.Random(0))
        assert server.wait(60) != 0
        assert "killed by SIGKILL" in server.output or "does not answer" in server.output
