"""Batches of a real server that is killed: what is left is done by the next one, once, and as direct calls would."""

import contextlib
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.support.batch_files import create, line, read, wait
from tests.support.server import DEMO_MODEL, ServerProcess

URL = "/v1/chat/completions"
WORDS = f"{DEMO_MODEL} --distributed-executor-backend local --device cpu --host 127.0.0.1 --port 0 --grpc-port 0 \
    --kv-cache-memory-bytes 32MiB --served-model-name demo --dtype float32 --max-num-seqs 8 \
    --max-num-batched-tokens 64"


def lines(tenant: str, number: int) -> list[dict[str, Any]]:
    return [
        line(f"{tenant}{n}", URL, messages=[{"role": "user", "content": f"How many {tenant} have {n}?"}], temperature=0,
             max_tokens=100, ignore_eos=True)
        for n in range(number)
    ]  # fmt: skip


def text(body: Any) -> str:
    found: str = body["choices"][0]["message"]["content"]
    return found


def test_a_killed_server_loses_no_line_and_doubles_none(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a:sk-a\nb:sk-b\n")
    words = [*WORDS.split(), "--api-key-file", str(tmp_path / "keys"), "--batch-dir", str(tmp_path / "new" / "batches")]
    asked = {"a": lines("a", 24), "b": lines("b", 8)}

    def clients(server: ServerProcess) -> dict[str, openai.OpenAI]:
        return {name: openai.OpenAI(base_url=f"{server.url}/v1", api_key=f"sk-{name}") for name in asked}

    with ServerProcess(*words).wait_ready() as server:
        by = clients(server)
        made = {name: create(by[name], asked[name], endpoint=URL) for name in asked}
        counts = [0]
        while counts[-1] < 8:
            time.sleep(0.01)
            counts.append(by["a"].batches.retrieve(made["a"].id).request_counts.completed)  # type: ignore[union-attr]
        for pid in server.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.wait(10)

    with ServerProcess(*words, "--api-server-count", "2").wait_ready() as server:
        by = clients(server)
        before = by["a"].batches.retrieve(made["a"].id)
        assert before.status in ("in_progress", "finalizing", "completed")
        assert counts[-1] <= (before.request_counts.completed if before.request_counts else 0)
        for name, each in asked.items():
            done = wait(by[name], made[name], timeout_s=60)
            assert (done.status, done.error_file_id) == ("completed", None)
            got = read(by[name], done.output_file_id)
            assert got.keys() == {one["custom_id"] for one in each}
            with httpx.Client(headers={"authorization": f"Bearer sk-{name}"}, timeout=60) as http:
                for one in each[::6]:
                    direct = http.post(server.url + URL, json=one["body"]).json()
                    assert text(got[one["custom_id"]]["response"]["body"]) == text(direct)
        # Both frontends have answered; one ran the lines.
        assert len(re.findall("this frontend runs the batches", server.output)) == 1
        assert server.interrupt() == 0
