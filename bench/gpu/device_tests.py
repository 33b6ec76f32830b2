"""The tests that are marked for GPUs, a process for each file: most of their time goes into compiling kernels."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).parents[2]


def run(timeout_s: float) -> Iterator[dict[str, Any]]:
    """One record per file, as it ends. Raises RuntimeError behind the last one if any failed."""
    if find_spec("pytest") is None:
        yield {"skipped": "pytest is not installed"}
        return
    files = sorted(
        path for folder in ("kernels", "workers") for path in (_ROOT / "tests" / folder).rglob("test_*.py")
        if "mark.gpu" in path.read_text(encoding="utf-8")
    )  # fmt: skip
    failed = []
    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2))) as pool:
        for file, (code, output) in zip(files, pool.map(partial(_run, timeout_s=timeout_s), files), strict=True):
            last = (output.strip().splitlines() or [""])[-1]
            name = str(file.relative_to(_ROOT))
            print(f"{name}: {last}" if code in (0, 5) else output[-3000:], flush=True)
            failed += [] if code in (0, 5) else [name]
            yield {"file": name, "pytest": last, "exit_code": code}
    if failed:
        raise RuntimeError(f"tests failed in {', '.join(failed)}")


def _run(file: Path, timeout_s: float) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--durations=3", str(file)]
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT / ".typing"), os.environ.get("PYTHONPATH"))))
    if torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "0"  # whatever tests/conftest.py makes of this machine's /dev
    try:
        done = subprocess.run(
            command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False, timeout=max(1.0, timeout_s),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 124, f"not done after {timeout_s:.0f} s"
    return done.returncode, done.stdout
