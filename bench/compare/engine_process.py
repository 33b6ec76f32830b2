"""One engine in a process of its own that is loaded once and told by JSON lines what to run."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import process_tree
from workloads import Workload

FOLDER = Path(__file__).parent
KINDS = ("manta", "vllm", "transformers")


@dataclass(frozen=True)
class Spec:
    """An engine and its settings, as `vllm:dtype=float32,only=mixed+prefix`.

    `only` names the workloads it runs; `limit` the number of their first requests it runs. The rest goes to the engine.
    """

    text: str
    kind: str
    options: dict[str, Any]
    only: tuple[str, ...] | None = None
    limit: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError for an unknown engine or an option without a value."""
        kind, _, rest = text.partition(":")
        if kind not in KINDS:
            raise ValueError(f"no engine {kind!r}; there are {', '.join(KINDS)}")
        pairs = [pair.partition("=") for pair in rest.split(",")] if rest else []
        if not all(name and value for name, _, value in pairs):
            raise ValueError(f"{text!r}: options are NAME=VALUE, with commas between them")
        options = {name: _value(value) for name, _, value in pairs}
        only = options.pop("only", None)
        return cls(text, kind, options, tuple(only.split("+")) if only else None, options.pop("limit", None))

    def runs(self, workload: str) -> bool:
        return self.only is None or workload in self.only


def _value(text: str) -> Any:
    words: dict[str, Any] = {"true": True, "false": False}
    return words.get(text.lower(), int(text) if text.isdigit() else text)


class EngineError(Exception):
    """An engine ended or answered wrongly; the message holds the end of its log."""


class EngineProcess:
    """Stopped (SIGSTOP) unless told to run, so that its idle loops take nothing from the engine that is measured.

    Manta alone goes on: it sleeps when idle, and its processes take a peer that is stopped for a dead one.
    """

    def __init__(self, spec: Spec, python: str, model: str, options: dict[str, Any], env: dict[str, str]) -> None:
        """`options` go to the engine's script; `env` is added to the environment."""
        self.spec = spec
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (lives as long as the process)
        begin_s = time.perf_counter()
        # A group of its own within this session: when this process dies, the kernel wakes and ends a stopped group.
        self._process = subprocess.Popen(
            [python, str(FOLDER / f"engine_{spec.kind}.py"), model, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | env,
            process_group=0,
            text=True,
        )
        self.versions: dict[str, str] = self._answer()["versions"]
        self.load_s = time.perf_counter() - begin_s
        self.ask([[5] * 128], [1])
        self.start_s = time.perf_counter() - begin_s  # to the first token
        self.pause()

    @property
    def pids(self) -> list[int]:
        return process_tree.tree(self._process.pid)

    def ask(self, prompts: list[list[int]], output_lens: list[int], *, return_tokens: bool = False) -> dict[str, Any]:
        """Runs the requests; the answer has `total_s` and, if asked for, `tokens`."""
        assert self._process.stdin is not None
        request = {"prompts": prompts, "output_lens": output_lens, "return_tokens": return_tokens}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if answer["output_lens"] != output_lens:
            raise EngineError(f"{self.spec.text} gave outputs of other lengths than asked for: {answer['output_lens']}")
        return answer

    def run(self, workload: Workload) -> float:
        """Seconds for all its requests."""
        total_s: float = self.ask(workload.prompts, workload.output_lens)["total_s"]
        return total_s

    def pause(self) -> None:
        if self.spec.kind != "manta":
            self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Ends the process and what it started."""
        pids = self.pids
        self._signal(signal.SIGCONT)
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            for pid in pids:
                _kill(pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.pids:
            _kill(pid, number)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise EngineError(f"{self.spec.text} has ended:\n" + "".join(self._log.readlines()[-25:]))
        answer: dict[str, Any] = json.loads(line)
        return answer


def _kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        print(f"process {pid} has ended before a signal reached it", file=sys.stderr)
