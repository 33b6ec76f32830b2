"""A worker on a GPU needs no compiler for CPUs."""

import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")


def test_workers_import_without_numba() -> None:
    modules = "manta.workers.rank, manta.workers.service, manta.workers.device_steps, manta.kernels.sample_triton"
    code = f"import sys; sys.modules['numba'] = sys.modules['llvmlite'] = None; import {modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
