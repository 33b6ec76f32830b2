"""The worker process: how it says where it is, and when it ends."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manta.workers.standby import wait_for_turn
from tests.support.worker_client import WorkerClient

DEADLINE_S = 60.0
LAUNCHER = """
import subprocess, sys, os, threading
command = [sys.executable, "-m", "manta.workers.main", "--parent-pid", str(os.getpid())]
start = lambda: print(subprocess.Popen(command, stdout=sys.stdout).pid, flush=True)
thread = threading.Thread(target=start)
thread.start()
thread.join()
sys.stdin.read()
"""


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return  # nobody is left to reap it
        time.sleep(0.01)
    raise TimeoutError(f"process {pid} is still there")


def test_ends_when_its_parent_is_killed_but_not_with_the_thread_that_started_it() -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    assert launcher.stdin is not None
    pid, address = 0, ""
    while not (pid and address):  # the two lines may come in any order
        line = launcher.stdout.readline()
        assert line
        if line.startswith("MANTA_ADDRESS "):
            address = line.split()[1]
        else:
            pid = int(line)
    client = WorkerClient(address)
    assert client.describe().pid == pid  # it has survived the launcher's thread
    client.close()
    launcher.kill()
    launcher.wait()
    wait_until_gone(pid)
    launcher.stdin.close()
    launcher.stdout.close()


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_ends_cleanly_on_a_signal_and_writes_its_address(tmp_path: Path, signal_number: signal.Signals) -> None:
    path = tmp_path / "address"
    process = subprocess.Popen(
        [sys.executable, "-m", "manta.workers.main", "--address-file", str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"MANTA_ADDRESS {path.read_text()}\n"
    process.send_signal(signal_number)
    assert process.wait(DEADLINE_S) == 0
    process.stdout.close()


def test_says_when_its_port_is_taken() -> None:
    first = subprocess.Popen([sys.executable, "-m", "manta.workers.main"], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    port = first.stdout.readline().strip().rpartition(":")[2]
    second = subprocess.run(
        [sys.executable, "-m", "manta.workers.main", "--port", port],
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    first.kill()
    first.wait()
    first.stdout.close()
    assert second.returncode == 1
    assert second.stdout.startswith(f"MANTA_ERROR worker cannot listen on 127.0.0.1:{port}")


@pytest.mark.parametrize("host", ["203.0.113.1", "no.such.host.invalid"])
def test_says_when_it_has_no_such_address(host: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "manta.workers.main", "--host", host],
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stdout.startswith(f"MANTA_ERROR worker cannot listen on {host}:0")
    assert ended.stdout.count("\n") == 1


def test_stands_by_until_it_is_called() -> None:
    """It has imported everything and listens nowhere; the line it gets may come before it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "manta.workers.main", "--standby"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write('{"CUDA_VISIBLE_DEVICES": "", "NOTHING": "1"}\n')
    process.stdin.flush()
    line = process.stdout.readline()
    assert line.startswith("MANTA_ADDRESS ")
    client = WorkerClient(line.split()[1])
    assert client.describe().pid == process.pid
    client.close()
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_one_that_stands_by_ends_when_nobody_can_call_it() -> None:
    assert not wait_for_turn(io.StringIO())
