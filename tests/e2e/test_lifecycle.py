"""Start, stop and fail as a terminal sees it; plain processes where Ray makes no difference, they start sooner."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support.server import DEMO_MODEL, ROOT, ServerProcess, wait_until

QUICK = ("--kv-cache-memory-bytes", "16MiB", "--max-num-seqs", "8", "--port", "0", "--grpc-port", "0")
LOCAL = (str(DEMO_MODEL), "--distributed-executor-backend", "local", *QUICK)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def _ports(server: ServerProcess) -> list[int]:
    return [int(server.url.rsplit(":", 1)[1]), int(server.grpc_address.rsplit(":", 1)[1])]


def test_ready_block_and_two_runs_on_the_same_ports() -> None:
    with ServerProcess(*LOCAL).wait_ready() as server:
        ports = _ports(server)
        assert re.search(r"# CPU blocks: \d+", server.output)
        assert "tensor 1, pipeline 1" in server.output
        assert re.search(r"start-up +[\d.]+ s:", server.output)
        curl = re.search(r"^try +(curl .*)$", server.output, re.MULTILINE)
        assert curl
        pasted = subprocess.run(["bash", "-c", curl.group(1)], capture_output=True, text=True, timeout=60, check=True)
        assert "SELECT" in pasted.stdout
        assert server.interrupt() == 0
    assert all(_is_free(port) for port in ports)

    with ServerProcess(*LOCAL[:-4], "--port", str(ports[0]), "--grpc-port", str(ports[1])).wait_ready() as again:
        assert _ports(again) == ports
        assert again.interrupt() == 0


def test_ctrl_c_lets_running_streams_finish() -> None:
    with ServerProcess(*LOCAL).wait_ready() as server:
        body = {"model": str(DEMO_MODEL), "prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
        started, chunks = threading.Event(), []

        def read() -> None:
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    chunks.append(line)
                    started.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert started.wait(30)
        assert server.interrupt() == 0
        reader.join(30)
        assert "data: [DONE]" in chunks
        assert '"finish_reason":"length"' in "".join(chunks)


def test_second_ctrl_c_and_sigterm_end_it() -> None:
    with ServerProcess(*LOCAL, "--shutdown-timeout", "600").wait_ready() as server:
        body = {"model": str(DEMO_MODEL), "prompt": "a", "max_tokens": 1800, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()  # held: an iterator that is dropped closes the connection
            next(lines)
            server.signal(signal.SIGTERM)
            server.wait_for("draining", 10)
            server.signal(signal.SIGINT)
            assert server.wait(30) in (0, 130)


def test_killed_parent_leaves_nothing() -> None:
    with ServerProcess(*LOCAL).wait_ready() as server:
        assert len(server.processes()) >= 4
        server.signal(signal.SIGKILL)
        server.wait(10)
        wait_until(lambda: not server.processes(), 15, "the end of the orphans")


def test_a_worker_that_is_killed_too_often_is_named_and_everything_ends() -> None:
    with ServerProcess(*LOCAL, "--restart-limit", "1").wait_ready() as server:
        worker = next(pid for pid, command in server.processes().items() if "manta.workers.main" in command)
        os.kill(worker, signal.SIGKILL)
        assert server.wait(60) == 1
        assert "error: worker 0 was killed by SIGKILL" in server.output


def test_a_killed_replica_costs_no_stream() -> None:
    """Its sequences run on where the other replica has room; greedy fp32 text is what it would have been."""
    with ServerProcess(*LOCAL, "-dp", "2", "--dtype", "float32").wait_ready() as server:
        bodies = [
            {"model": str(DEMO_MODEL), "prompt": prompt, "max_tokens": 600, "ignore_eos": True, "temperature": 0}
            for prompt in ("a", "b", "c", "d")
        ]

        def complete(body: dict[str, object]) -> str:
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).json()
            return str(answer["choices"][0]["text"])

        with ThreadPoolExecutor(len(bodies)) as clients:
            running = [clients.submit(complete, body) for body in bodies]
            tables = f"{server.url}/block_tables"
            wait_until(
                lambda: {0, 1} <= {s["replica"] for s in httpx.get(tables).json()["sequences"]}, 30, "work on both"
            )
            worker = next(pid for pid, command in server.processes().items() if "manta.workers.main" in command)
            os.kill(worker, signal.SIGKILL)
            together = [answer.result() for answer in running]
        server.wait_for("worker . was killed by SIGKILL; replica . is started again", 10)
        assert together == [complete(body) for body in bodies]
        assert server.interrupt() == 0


def test_interrupt_while_starting_leaves_nothing() -> None:
    with ServerProcess(*LOCAL) as server:
        wait_until(lambda: any("manta.workers.main" in c for c in server.processes().values()), 30, "a worker")
        assert server.interrupt() == 130


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["/no/such/folder"], "model folder '/no/such/folder' does not exist"),
        ([str(DEMO_MODEL), "--tensor-paralel-size", "2"], "did you mean --tensor-parallel-size?"),
        ([str(DEMO_MODEL), "-tp", "3"], "--tensor-parallel-size 3 does not divide"),
        ([str(DEMO_MODEL), "--kv-cache-memory-bytes", "1KiB"], "--kv-cache-memory-bytes 1024 holds"),
        ([str(DEMO_MODEL), "--max-model-len", "1000000"], "--max-model-len 1000000"),
        ([], "name the model"),
        ([str(DEMO_MODEL), "--ray-address", "127.0.0.1:9"], "no Ray cluster at '127.0.0.1:9' can be joined"),
        ([str(DEMO_MODEL), "--ray-address", "http://127.0.0.1:8265"], "is a URL"),
    ],
)
def test_mistakes_end_within_seconds(words: list[str], sentence: str) -> None:
    started_s = time.monotonic()
    command = [sys.executable, "-m", "manta.cluster.cli.main", "serve", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert time.monotonic() - started_s < 15


def test_port_in_use_ends_within_seconds() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        server = ServerProcess(*LOCAL[:-4], "--port", port, "--grpc-port", "0")
        assert server.wait(30) == 2
    assert f"--port {port} cannot be used" in server.output
    server.close()


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    for file in DEMO_MODEL.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with ServerProcess(str(tmp_path), *LOCAL[1:]) as server:
        assert server.wait(60) == 2
        last = server.output.strip().splitlines()[-1]
        assert last.startswith("manta: error:")
        assert "model.safetensors" in last
