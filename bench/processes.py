"""Processes of the benchmarks: started from modules beside this file, and what they cost."""

import time
from pathlib import Path

from manta.cluster.launch.process import ChildProcess


def spawn(name: str, module: str, args: list[str]) -> ChildProcess:
    """A process that runs a module, of Manta or beside this file."""
    env = {"PYTHONPATH": str(Path(__file__).parent)}
    return ChildProcess(name, module, args, env)


def cpu_s(pids: list[int]) -> float:
    """Processor seconds of the processes so far, all their threads: Linux's CPU clocks, exact to the nanosecond."""
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)
