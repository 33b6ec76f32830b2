"""`manta collect-env`: what a bug report should say about a machine."""

import argparse
import os
import platform
from importlib import metadata
from pathlib import Path

from manta.cluster.preflight import available_memory_bytes

_PACKAGES = ["manta", "ray", "torch", "triton", "transformers", "tokenizers", "grpcio", "protobuf", "pydantic", "numba"]


def collect_env(argv: list[str]) -> int:
    """Prints versions and hardware."""
    argparse.ArgumentParser(prog="manta collect-env", description=__doc__).parse_args(argv)
    print(f"{'python':14}{platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        try:
            print(f"{package:14}{metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package:14}not installed")
    print(f"{'CPU':14}{_cpu_name()}, {os.cpu_count()} cores")
    print(f"{'free memory':14}{available_memory_bytes() / 2**30:.1f} GiB")
    for line in _gpu_lines():
        print(line)
    return 0


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu_lines() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return [f"{'GPU':14}none"]
    return [
        f"{'GPU ' + str(i):14}{torch.cuda.get_device_name(i)}, "
        f"{torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        for i in range(torch.cuda.device_count())
    ]
