"""Where each engine runs: its Python and the environment variables that give it its best speed."""

import os
import subprocess
import sys
from glob import glob
from pathlib import Path
from typing import Any

from engine_process import Spec

_TCMALLOC = "/usr/lib/*/libtcmalloc_minimal.so.4"


def python_of(spec: Spec, vllm_python: str | None) -> str:
    """Raises ValueError when vLLM is asked for without its Python."""
    if spec.kind != "vllm":
        return sys.executable
    if vllm_python is None:
        raise ValueError("vLLM lives in an environment of its own; give its interpreter with --vllm-python")
    return vllm_python


def options_of(spec: Spec, kv_gib: int) -> dict[str, Any]:
    """What the spec says, with as much memory for KV blocks as every engine gets; vLLM reads that from `env_of`."""
    memory: dict[str, dict[str, Any]] = {
        "manta": {"kv_cache_memory_bytes": f"{kv_gib}GiB"},
        "transformers": {"kv_gib": kv_gib},
    }
    return memory.get(spec.kind, {}) | spec.options


def env_of(
    spec: Spec, *, kv_gib: int, vllm_python: str | None, vllm_env: list[str], cache_folder: str | None
) -> dict[str, str]:
    """Offline; compile caches in `cache_folder` if one is given. `vllm_env` are NAME=VALUE that override ours.

    vLLM gets every core (its own choice would leave one idle) and, as its documentation recommends, tcmalloc and
    Intel's OpenMP. Raises ValueError when one of these libraries is not there.
    """
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if cache_folder is not None:
        for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR"):
            env[name] = str(Path(cache_folder) / name.lower())
    if spec.kind == "vllm":
        assert vllm_python is not None
        cores = sorted(os.sched_getaffinity(0))
        env |= {
            "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_NO_USAGE_STATS": "1",
            "LD_PRELOAD": ":".join(_preload(vllm_python)),
        }
        env |= dict(pair.split("=", 1) for pair in vllm_env)
    return env


def _preload(vllm_python: str) -> list[str]:
    prefix = subprocess.run(
        [vllm_python, "-c", "import sys; print(sys.prefix)"], check=True, capture_output=True, text=True
    ).stdout.strip()
    libraries = []
    for name, pattern in (("libtcmalloc-minimal4", _TCMALLOC), ("intel-openmp", f"{prefix}/lib/libiomp5.so")):
        found = glob(pattern)
        if not found:
            raise ValueError(f"{pattern} is missing: install {name}, or set LD_PRELOAD with --vllm-env")
        libraries.append(found[0])
    return libraries
