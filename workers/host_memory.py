"""How much memory this host, or the container this process runs in, can still give."""

import os
from pathlib import Path

_CGROUP_V2 = ("memory.max", "memory.current")
_CGROUP_V1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that can be taken without swapping, the container's limit respected. `root` is where proc and sys lie."""
    available_bytes = _meminfo_available_bytes(root / "proc/meminfo")
    for limit_name, usage_name in (_CGROUP_V2, _CGROUP_V1):
        limit = _read_number(root / "sys/fs/cgroup" / limit_name)
        usage = _read_number(root / "sys/fs/cgroup" / usage_name)
        if limit is not None and usage is not None:
            available_bytes = min(available_bytes, max(0, limit - usage))
    return available_bytes


def _meminfo_available_bytes(path: Path) -> int:
    if path.is_file():
        for line in path.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read_number(path: Path) -> int | None:
    """The file's number; None if there is no such file or it says "max"."""
    if not path.is_file():
        return None
    text = path.read_text(encoding="ascii").strip()
    return int(text) if text.isdigit() else None
