"""`ray job submit` starts the service on a running Ray cluster, and `ray job stop` drains it."""

import os
import re
import secrets
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.server import ROOT, processes_with_tag, wait_until

_CLUSTER = """
import ray, sys
context = ray.init(address="local", include_dashboard=True, dashboard_port=0, num_cpus=4, log_to_driver=False,
                   object_store_memory=128 * 2**20)
print("DASHBOARD", context.dashboard_url, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def dashboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Ray cluster of its own with a job server and token authentication; ends with its standard input."""
    tag = uuid.uuid4().hex
    (tmp_path / "token").write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"MANTA_TEST_TAG": tag}
    cluster = subprocess.Popen(
        [sys.executable, "-c", _CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT
    )
    assert cluster.stdout is not None
    for line in cluster.stdout:
        if line.startswith("DASHBOARD"):
            yield f"http://{line.split()[1]}"
            break
    cluster.communicate(timeout=60)
    wait_until(lambda: not processes_with_tag(tag), 30, "the end of the Ray cluster")


def _ray(*words: str) -> str:
    ray = os.path.join(os.path.dirname(sys.executable), "ray")
    done = subprocess.run([ray, *words], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.ray
def test_job_serves_and_stops(dashboard: str) -> None:
    job = f"serve-{uuid.uuid4().hex[:8]}"
    manta = os.path.join(os.path.dirname(sys.executable), "manta")
    _ray(
        "job", "submit", "--address", dashboard, "--working-dir", ".", "--submission-id", job, "--no-wait",
        "--", manta, "serve", "--config", "configs/demo.yaml", "--port", "0", "--grpc-port", "0",
    )  # fmt: skip

    def log() -> str:
        return _ray("job", "logs", "--address", dashboard, job)

    wait_until(lambda: "Ctrl-C drains" in log(), 120, "the ready block in the job's log")
    found = re.search(r"HTTP +(http://\S+)/v1", log())
    assert found
    body = {"model": "text2sql", "prompt": "SELECT", "max_tokens": 5}
    answer = httpx.post(f"{found.group(1)}/v1/completions", json=body, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] <= 5

    _ray("job", "stop", "--address", dashboard, job)
    wait_until(lambda: "was stopped" in _ray("job", "status", "--address", dashboard, job), 60, "the end of the job")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{found.group(1)}/health")
