"""A request that kills every worker that runs it ends with an error; its neighbours notice pauses, and no replica is
given up for it."""

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.server import DEMO_MODEL, ServerProcess

POISON = [77, 78, 77, 79]
# Imported by every Python process of the server before its own modules: a fault in the worker that the product has no
# switch for.
FAULT = f"""
import os, struct, sys
if "manta.workers.main" in sys.orig_argv:
    from manta.workers.service import WorkerService
    step, poison = WorkerService._step, struct.pack("<4i", *{POISON})
    def fatal(self, runner, guard, plan, *rest):
        if any(add.tokens.startswith(poison) for add in plan.adds):
            os._exit(66)
        return step(self, runner, guard, plan, *rest)
    WorkerService._step = fatal
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerProcess]:
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = (
        str(DEMO_MODEL), "--distributed-executor-backend", "local", "--dtype", "float32", "--port", "0",
        "--grpc-port", "0", "--kv-cache-memory-bytes", "32MiB", "--standby-workers", "2",
    )  # fmt: skip
    with ServerProcess(*words).wait_ready() as server:
        yield server
        assert server.interrupt() == 0


def complete(server: ServerProcess, prompt: list[int], num_tokens: int) -> httpx.Response:
    body = {"model": str(DEMO_MODEL), "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)


def test_a_request_that_kills_workers_ends_alone(server: ServerProcess) -> None:
    prompts = [[10 + i, 20, 30] for i in range(4)]
    expected = [complete(server, prompt, 100).json()["choices"][0]["text"] for prompt in prompts]
    found: dict[int, httpx.Response] = {}

    def ask(place: int, prompt: list[int]) -> None:
        found[place] = complete(server, prompt, 100)

    threads = [threading.Thread(target=ask, args=each) for each in enumerate([*prompts, POISON])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[place].json()["choices"][0]["text"] for place in range(4)] == expected
    poisoned = found[4]
    assert poisoned.status_code == 500
    error = poisoned.json()["error"]
    assert "the workers fail whenever they run this request" in error["message"]
    assert error["type"] == "InternalServerError"
    assert server.output.count("replica 0 is started again") >= 3  # the limit of restarts, had it been the replica
    assert complete(server, prompts[0], 100).json()["choices"][0]["text"] == expected[0]
