"""Runs the real `manta serve` as a user would, and finds what it leaves behind."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "examples" / "text2sql" / "model"
READY_TIMEOUT_S = 120.0
_TAG = "MANTA_TEST_TAG"


def wait_until(condition: "object", timeout_s: float, what: str) -> None:
    """Polls `condition()` until it is true; fails the test when the deadline passes."""
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.02)


def processes_with_tag(tag: str) -> dict[int, str]:
    """pid -> command line of every live process that inherited the tag, however it was started."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"{_TAG}={tag}".encode() in (path / "environ").read_bytes():
                state = (path / "stat").read_text().rsplit(")", 1)[1].split()[0]
                if state != "Z":
                    found[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


class ServerProcess:
    """`manta serve` with given words. Ports are free ones unless the words say otherwise."""

    def __init__(self, *words: str, cwd: Path = ROOT) -> None:
        self.tag = uuid.uuid4().hex
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "manta.cluster.cli.main", "serve", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {_TAG: self.tag, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_ready(self) -> "ServerProcess":
        try:
            self.wait_for(r"Ctrl-C drains", READY_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        return self

    def wait_for(self, pattern: str, timeout_s: float) -> None:
        """Waits until the output matches; fails at once when the server ends before."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not re.search(pattern, self.output):
                left = deadline - time.monotonic()
                assert left > 0, f"no {pattern!r} within {timeout_s} s:\n{self.output}"
                assert self._process.poll() is None, f"the server ended early:\n{self.output}"
                self._changed.wait(min(left, 0.2))

    @property
    def url(self) -> str:
        """Of HTTP, without /v1."""
        found = re.search(r"^HTTP +(http://\S+)/v1$", self.output, re.MULTILINE)
        assert found, self.output
        return found.group(1)

    @property
    def grpc_address(self) -> str:
        found = re.search(r"^gRPC +(\S+)$", self.output, re.MULTILINE)
        assert found, self.output
        return found.group(1)

    def processes(self) -> dict[int, str]:
        return processes_with_tag(self.tag)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        """The exit code."""
        code = self._process.wait(timeout=timeout_s)
        self._reader.join(timeout=5)
        return code

    def interrupt(self, timeout_s: float = 60.0) -> int:
        """Ctrl-C, as a terminal sends it; returns the exit code."""
        self.signal(signal.SIGINT)
        return self.wait(timeout_s)

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends it, by force if it must, and asserts that nothing is left."""
        if self._process.poll() is None:
            self.interrupt()
        wait_until(lambda: not self.processes(), 15, f"the end of all processes of the server ({self.processes()})")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()
