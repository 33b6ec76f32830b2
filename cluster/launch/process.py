"""One child process that says where it listens."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from queue import Empty, Queue

from manta.cluster.launch.launcher import LaunchError

_ADDRESS = "MANTA_ADDRESS "
_ERROR = "MANTA_ERROR "
_END_S = 5.0
_KILL_S = 10.0
_LOOK_S = 0.25
STOPPED_S = 1.0  # a child that a signal has stopped for so long will not go on by itself


class ChildProcess:
    """Runs `python -m module`; the child prints one line MANTA_ADDRESS once it serves, or MANTA_ERROR and ends.

    What else it prints goes to this process's stderr under its name. It lives in a session of its own, so that a
    Ctrl-C at the terminal reaches only the parent, which ends its children in order.
    """

    def __init__(
        self,
        name: str,
        module: str,
        args: list[str],
        env: dict[str, str] | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        """on_end: called, on a thread, when the child has ended."""
        self.name = name
        self._on_end = on_end
        self._replies: Queue[str | None] = Queue()
        self._last_lines: deque[str] = deque(maxlen=20)
        self._error: str | None = None
        self._address: str | None = None
        self._stopped_since_s: float | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | (env or {}) | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            text=True,
            errors="replace",
        )
        threading.Thread(target=self._read, name=f"{name}-output", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for_address(self, timeout_s: float, why_vain: Callable[[], str | None] | None = None) -> str:
        """The words after MANTA_ADDRESS. Raises LaunchError if the child ends first or takes too long, or when
        `why_vain` says why it never will, which is asked a few times a second."""
        if self._address is not None:
            return self._address
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                reply = self._replies.get(timeout=min(max(deadline_s - time.monotonic(), 0.0), _LOOK_S))
                break
            except Empty:
                if why_vain is not None and (why := why_vain()):
                    raise LaunchError(why) from None
                if time.monotonic() >= deadline_s:
                    raise LaunchError(f"{self.name} did not come up within {timeout_s:.0f} s") from None
        if reply is None:
            self._process.wait(timeout=10)
            raise LaunchError(self._why_ended())
        self._address = reply
        return reply

    def tell(self, line: str) -> None:
        """Writes a line to the child's standard input. A child that has ended does not hear it; others notice."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def ended(self) -> str | None:
        """One sentence if the child has ended by itself."""
        return None if self._process.poll() is None else self._why_ended()

    def stopped(self) -> str | None:
        """One sentence if a signal, such as SIGSTOP, has stopped the child a while ago; Linux only. To be asked again
        and again: it sees only what is. A debugger stops a process otherwise, which does not count."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            state = ""
        if state != "T":
            self._stopped_since_s = None
            return None
        now_s = time.monotonic()
        if self._stopped_since_s is None:
            self._stopped_since_s = now_s
        if now_s - self._stopped_since_s < STOPPED_S:
            return None
        return f"{self.name} has been stopped by a signal"

    def terminate(self) -> None:
        """Asks the child to end."""
        if self._process.poll() is None:
            self._process.terminate()

    def make_way(self) -> None:
        """Tells a frontend that another one has its ports (SIGUSR1)."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """Ends the child and its session now."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # in a driver that hangs; others must end all the same
            self._process.wait(timeout=_KILL_S)

    def join(self, timeout_s: float) -> None:
        """Waits for the end; kills the child and its session when it takes longer."""
        try:
            self._process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_ADDRESS):
                self._replies.put(line.removeprefix(_ADDRESS).strip())
            elif line.startswith(_ERROR):
                self._error = line.removeprefix(_ERROR).strip()
            else:
                self._last_lines.append(line.rstrip())
                with contextlib.suppress(OSError):  # where nobody reads our stderr any more, the child must go on
                    print(f"[{self.name}] {line}", end="", file=sys.stderr, flush=True)
        self._replies.put(None)
        with contextlib.suppress(subprocess.TimeoutExpired):  # of one that has only closed its output
            self._process.wait(timeout=_END_S)
        if self._on_end is not None:
            self._on_end()

    def _why_ended(self) -> str:
        if self._error:
            return self._error
        code = self._process.returncode
        if code and code < 0:
            return f"{self.name} was killed by {signal.Signals(-code).name}"
        last = next((line for line in reversed(self._last_lines) if line.strip()), "")
        return f"{self.name} ended with exit code {code}" + (f": {last}" if last else "")
