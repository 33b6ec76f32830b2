"""CPU time and memory of a process and all it started, from /proc (Linux)."""

import os
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def tree(root: int) -> list[int]:
    """The process ids of `root` and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [root]
    for pid in found:  # grows while it is read
        found += children.get(pid, [])
    return found


def cpu_s(pids: list[int]) -> float:
    """Seconds of CPU time that the processes and their ended children have used."""
    return sum(sum(map(int, fields[11:15])) for pid in pids if (fields := _stat(pid))) * _TICK_S


def cpu_s_by_pid() -> dict[int, float]:
    """Seconds of CPU time of every process on the host."""
    return {int(entry.name): cpu_s([int(entry.name)]) for entry in Path("/proc").iterdir() if entry.name.isdigit()}


def command(pid: int) -> str:
    """What the process runs, shortened; its number when it has ended."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        words = ""
    return f"{pid} {words[:80]}".strip()


def busy_s() -> float:
    """Seconds of CPU time that anything on the host has used, without what a hypervisor took."""
    user, nice, system, _idle, _iowait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) * _TICK_S


def pss_bytes(pids: list[int]) -> int:
    """Resident memory, with each shared page counted once."""
    return sum(_kib(pid, "smaps_rollup", "Pss:") for pid in pids) * 1024


def peak_rss_bytes(pids: list[int]) -> int:
    """Sum of the highest resident memory of each process so far; shared pages count several times."""
    return sum(_kib(pid, "status", "VmHWM:") for pid in pids) * 1024


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; [] when the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _kib(pid: int, file: str, key: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(key)), 0)
