"""The threads that compute steps together, and the kernels they run, compiled for one dtype."""

import threading
from typing import Any

import numpy as np
import torch
from numba import int64, typeof

from manta.kernels.cpu_decoder import program
from manta.kernels.cpu_scalars import KINDS


class Team:
    """`num_threads` threads, of which the caller is one. The others sleep between steps and need no GIL.

    They are daemons without an end: a process has one team per dtype and number of threads.
    """

    def __init__(self, num_threads: int, dtype: torch.dtype, *, uses_dot: bool) -> None:
        self.num_threads = num_threads
        self.left_dtype = torch.bfloat16 if uses_dot else torch.float32  # of the left-hand sides of products
        self._kinds: Any = (KINDS[self.left_dtype], KINDS[dtype])
        self.kernels = program.kernel_addresses(*self._kinds)  # field of a step's table -> address
        for loop in (program.lead, program.follow):
            loop.compile((int64, int64, int64, int64, *map(typeof, self._kinds)))
        self._lock = threading.Lock()
        self._memory = np.zeros(program.TEAM_FIELDS + 8, np.int64)
        self._address = -(-self._memory.ctypes.data // 64) * 64
        for thread in range(1, num_threads):
            arguments = (thread, num_threads, self._address, 0, *self._kinds)
            threading.Thread(target=program.follow, args=arguments, name=f"compute-{thread}", daemon=True).start()

    def run(self, job: int, step: int) -> None:
        """Runs the job of the step table at address `step` on all threads."""
        with self._lock:
            program.lead(job, step, self.num_threads, self._address, *self._kinds)


_teams: dict[tuple[int, torch.dtype, bool], Team] = {}
_teams_lock = threading.Lock()


def team_of(num_threads: int, dtype: torch.dtype, *, uses_dot: bool) -> Team:
    """The process's team of this size for models of this dtype; the first call compiles what it runs.

    uses_dot: products of bfloat16 pairs, for bfloat16 models only: see `dot`.
    """
    with _teams_lock:
        key = (num_threads, dtype, uses_dot)
        if key not in _teams:
            _teams[key] = Team(num_threads, dtype, uses_dot=uses_dot)
        return _teams[key]


def running_team(num_threads: int) -> Team | None:
    """A team of this size that a model of any dtype has made, for work of other kinds (CALL_JOB): a second team's
    threads would fight its threads for the cores."""
    with _teams_lock:
        return next((team for (size, _, _), team in _teams.items() if size == num_threads), None)
