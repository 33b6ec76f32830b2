"""One OpenAI-compatible server in a process of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import peers
import process_tree
from engine_process import EngineError, Spec

_VLLM_FLAGS = {"max_model_len": 4096, "max_num_seqs": 64, "max_num_batched_tokens": 4096, "seed": 0}
_MANTA = Path(sys.executable).parent / "manta"


class ServerProcess:
    """Between `resume` and `pause` it serves. vLLM's is stopped (SIGSTOP) otherwise; Manta's sleeps when idle."""

    def __init__(self, spec: Spec, model: str, port: int, kv_gib: int, vllm_python: str | None, limit_s: float) -> None:
        """Returns when the first token has been answered. Raises EngineError with the end of the server's log."""
        self.spec = spec
        self.port = port
        python = peers.python_of(spec, vllm_python)
        env = peers.env_of(spec, kv_gib=kv_gib, vllm_python=vllm_python, vllm_env=[], cache_folder=None)
        options = peers.options_of(spec, kv_gib)
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (lives as long as the process)
        begin_s = time.perf_counter()
        self._process = subprocess.Popen(
            _command(spec.kind, python, model, port, options),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | env,
            process_group=0,
        )
        warm_up = ["--num-prompts", "1", "--random-input-len", "128", "--random-output-len", "1"]
        self._wait_until_ready(begin_s + limit_s)
        self.bench(warm_up)
        self.start_s = time.perf_counter() - begin_s
        self.pause()

    def _wait_until_ready(self, deadline_s: float) -> None:
        while time.perf_counter() < deadline_s:
            if self._process.poll() is not None:
                raise EngineError(f"{self.spec.text} has ended:\n{self._end_of_log()}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/models"):
                return
            time.sleep(0.2)
        raise EngineError(f"{self.spec.text} is not ready:\n{self._end_of_log()}")

    def bench(self, flags: list[str]) -> None:
        """`manta bench serve` against it. Raises EngineError when that fails."""
        command = [str(_MANTA), "bench", "serve", "--port", str(self.port), "--disable-tqdm", *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or "Failed requests:                         0" not in done.stdout:
            raise EngineError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}\n{self._end_of_log()}")

    def pause(self) -> None:
        if self.spec.kind != "manta":
            self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Ends the server and what it started."""
        pids = process_tree.tree(self._process.pid)
        self._signal(signal.SIGCONT)
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            for pid in pids:
                _kill(pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        for pid in process_tree.tree(self._process.pid):
            _kill(pid, number)

    def _end_of_log(self) -> str:
        self._log.seek(0)
        return "".join(self._log.readlines()[-25:])


def _command(kind: str, python: str, model: str, port: int, options: dict[str, Any]) -> list[str]:
    if kind == "manta":
        begin = [str(_MANTA), "serve", model, "--distributed-executor-backend", "local", "--grpc-port", "0"]
    elif kind == "vllm":
        begin = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        options = _VLLM_FLAGS | options
    else:
        raise ValueError(f"{kind} has no server here; there are manta and vllm")
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*begin, "--port", str(port), *flags]


def _kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        print(f"process {pid} has ended before a signal reached it", file=sys.stderr)
