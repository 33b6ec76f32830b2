"""`ray job submit` starts the service on a running Ray cluster, and `ray job stop` drains it."""

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.server import ROOT, processes_with_tag, wait_until

RAY = os.path.join(os.path.dirname(sys.executable), "ray")


def _free_ports(count: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [str(one.getsockname()[1]) for one in sockets]


@pytest.fixture
def dashboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Ray cluster with a job server and token authentication, on ports of its own: others may run beside it."""
    tag = uuid.uuid4().hex
    (tmp_path / "token").touch(0o600)
    (tmp_path / "token").write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    # A folder of its own, with a short name because sockets lie in it: the user's "auto" stays what it is.
    folder = tempfile.mkdtemp(prefix="ray-")
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"MANTA_TEST_TAG": tag, "RAY_TMPDIR": folder}
    gcs, dashboard, agent, client = _free_ports(4)
    cluster = subprocess.Popen(
        [RAY, "start", "--head", "--block", "--num-cpus", "4", "--object-store-memory", str(128 * 2**20), "--port", gcs,
         "--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard, "--dashboard-agent-listen-port", agent,
         "--ray-client-server-port", client],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        cluster.terminate()
        cluster.wait(60)
        shutil.rmtree(folder, ignore_errors=True)
    wait_until(lambda: not processes_with_tag(tag), 30, "the end of the Ray cluster")


def _ray(*words: str) -> str:
    done = subprocess.run([RAY, *words], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _is_taken(*words: str) -> bool:
    """Whether Ray takes the job; it cannot before its dashboard and its agent are up."""
    done = subprocess.run([RAY, *words], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    not_yet = "No available agent" in done.stderr or "Failed to connect" in done.stderr
    assert done.returncode == 0 or not_yet, done.stdout + done.stderr
    return done.returncode == 0


@pytest.mark.ray
def test_job_serves_and_stops(dashboard: str) -> None:
    job = f"serve-{uuid.uuid4().hex[:8]}"
    manta = os.path.join(os.path.dirname(sys.executable), "manta")
    submit = ("job", "submit", "--address", dashboard, "--working-dir", ".", "--submission-id", job, "--no-wait")
    words = ("serve", "--config", "configs/demo.yaml", "--port", "0", "--grpc-port", "0")
    wait_until(lambda: _is_taken(*submit, "--", manta, *words), 90, "the start of Ray's job server")

    def is_up() -> bool:
        """Whether the job's log has the ready block; fails with the log when the job has ended."""
        log = _ray("job", "logs", "--address", dashboard, job)
        status = _ray("job", "status", "--address", dashboard, job)
        assert "failed" not in status, status + log
        return "Ctrl-C drains" in log

    wait_until(is_up, 120, "the ready block in the job's log")
    found = re.search(r"HTTP +(http://\S+)/v1", _ray("job", "logs", "--address", dashboard, job))
    assert found
    body = {"model": "text2sql", "prompt": "SELECT", "max_tokens": 5}
    answer = httpx.post(f"{found.group(1)}/v1/completions", json=body, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] <= 5

    _ray("job", "stop", "--address", dashboard, job)
    wait_until(lambda: "was stopped" in _ray("job", "status", "--address", dashboard, job), 60, "the end of the job")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{found.group(1)}/health")
