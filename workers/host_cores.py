"""How many cores this process can keep busy, on this host or in the container it runs in."""

import math
import os
from pathlib import Path

_CGROUP_V2 = "cpu.max"  # "QUOTA PERIOD" in microseconds; a quota of "max" is none
_CGROUP_V1 = ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")  # a quota of -1 is none


def num_cores(root: Path = Path("/")) -> int:
    """Cores this process may run on, a container's share of their time respected: threads beyond it are stopped in
    the midst of a layer while the others wait for them. `root` is where sys lies."""
    num_allowed = len(os.sched_getaffinity(0))
    cgroup = root / "sys/fs/cgroup"
    words = _words(cgroup / _CGROUP_V2) or [word for name in _CGROUP_V1 for word in _words(cgroup / name)]
    if len(words) != 2 or not all(word.isdigit() for word in words):
        return num_allowed
    quota_us, period_us = map(int, words)
    return max(1, min(num_allowed, math.ceil(quota_us / period_us)))


def _words(path: Path) -> list[str]:
    return path.read_text(encoding="ascii").split() if path.is_file() else []
