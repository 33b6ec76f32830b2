"""What the figures were measured on."""

import os
import platform
from pathlib import Path
from typing import Any

_EXTENSIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16")


def describe() -> dict[str, Any]:
    """Model and extensions of the CPU, cores this process may use, memory in GiB, kernel and Python."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", "").split())
    total_kib = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "cpu": fields.get("model name", platform.machine()),
        "extensions": [name for name in _EXTENSIONS if name in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(total_kib / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
