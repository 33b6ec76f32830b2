"""A child process says where it listens, or why it cannot."""

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from manta.cluster.launch.launcher import LaunchError, cores_per_worker
from manta.cluster.launch.process import STOPPED_S, ChildProcess
from tests.support.server import wait_until


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module whose behaviour is its first argument."""
    (tmp_path / "child_under_test.py").write_text("import os, signal, sys, threading\nexec(sys.argv[1])\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "child_under_test"


def test_address_and_orderly_end(module: str, capfd: pytest.CaptureFixture[str]) -> None:
    child = ChildProcess("role", module, ["print('hello'); print('MANTA_ADDRESS 1.2.3.4:5'); threading.Event().wait()"])
    assert child.wait_for_address(20) == "1.2.3.4:5"
    assert child.ended() is None
    child.terminate()
    child.join(10)
    assert "SIGTERM" in (child.ended() or "")
    assert "[role] hello" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("print('MANTA_ERROR the sky fell'); sys.exit(3)", "the sky fell"),
        ("sys.exit(3)", "role ended with exit code 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "role was killed by SIGKILL"),
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
    ],
)
def test_early_end_is_explained(module: str, code: str, sentence: str) -> None:
    child = ChildProcess("role", module, [code])
    with pytest.raises(LaunchError, match=sentence):
        child.wait_for_address(20)
    assert sentence in (child.ended() or "")


def test_a_child_goes_on_when_nobody_reads_its_output(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `manta serve 2>&1 | head`: more than a pipe holds comes before the address."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    child = ChildProcess("role", module, ["print('log\\n' * 100_000); print('MANTA_ADDRESS x')"])
    assert child.wait_for_address(20) == "x"
    child.join(10)


def test_a_child_that_ignores_sigterm_is_killed(module: str) -> None:
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('MANTA_ADDRESS x'); threading.Event().wait()"
    child = ChildProcess("role", module, [code])
    child.wait_for_address(20)
    child.terminate()
    child.join(0.2)
    assert "SIGKILL" in (child.ended() or "")
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_too_slow(module: str) -> None:
    child = ChildProcess("role", module, ["threading.Event().wait()"])
    with pytest.raises(LaunchError, match="did not come up"):
        child.wait_for_address(0.2)
    child.join(0)


@pytest.mark.parametrize(("cores", "workers", "threads"), [(2, 1, 2), (2, 4, 1), (16, 3, 5), (1, 0, 1)])
def test_threads_never_exceed_cores(cores: int, workers: int, threads: int) -> None:
    assert cores_per_worker(cores, workers) == threads


def test_an_end_is_told_at_once(module: str) -> None:
    """And is known by then."""
    reasons: list[str | None] = []
    told = threading.Event()

    def note() -> None:
        reasons.append(child.ended())
        told.set()

    child = ChildProcess("role", module, ["print('MANTA_ADDRESS x'); threading.Event().wait()"], on_end=note)
    child.wait_for_address(20)
    assert not told.is_set()
    os.kill(child.pid, signal.SIGKILL)
    assert told.wait(20)
    assert reasons == ["role was killed by SIGKILL"]


def test_same_interpreter(module: str) -> None:
    child = ChildProcess("role", module, ["print('MANTA_ADDRESS ' + sys.executable); threading.Event().wait()"])
    assert child.wait_for_address(20) == sys.executable
    child.terminate()
    child.join(10)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_that_a_signal_has_stopped_is_told_of_after_a_while(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    monkeypatch.setattr("manta.cluster.launch.process.time.monotonic", lambda: now_s)
    child = ChildProcess("role", module, ["print('MANTA_ADDRESS x'); threading.Event().wait()"])
    child.wait_for_address(20)
    assert child.stopped() is None
    os.kill(child.pid, signal.SIGSTOP)
    _wait_for_state(child.pid, "T")
    assert child.stopped() is None  # it may go on in a moment
    now_s += STOPPED_S
    assert child.stopped() == "role has been stopped by a signal"
    os.kill(child.pid, signal.SIGCONT)
    _wait_for_state(child.pid, "S")
    assert child.stopped() is None
    os.kill(child.pid, signal.SIGSTOP)
    _wait_for_state(child.pid, "T")
    assert child.stopped() is None  # the time begins anew
    child.kill()
    assert child.stopped() is None


def _wait_for_state(pid: int, state: str) -> None:
    stat = Path(f"/proc/{pid}/stat")
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == state, 20, f"state {state}")


def test_a_child_that_cannot_be_killed_holds_nobody_up(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that a driver keeps in the kernel."""
    child = ChildProcess("role", module, ["threading.Event().wait()"])

    def wait(timeout: float | None = None) -> int:
        raise subprocess.TimeoutExpired("role", timeout or 0.0)

    with monkeypatch.context() as patched:
        patched.setattr(child._process, "wait", wait)
        child.join(0.0)
    child.join(10)
