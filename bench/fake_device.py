"""A worker process whose device is a clock: the real gRPC server, streams and compute thread around a timed wait.

Started by the benchmarks beside it (`python -m fake_device`), as `python -m manta.workers.main` is by the launcher.

The device takes a plan when the compute thread hands it over, as a GPU's stream does, and is busy for exactly as long
as the seeds of the sequences say (microseconds), from the end of the step before or from the moment the plan was taken,
whichever is later. Nothing but rows is computed: who decodes, who prefills, how many tokens are sampled.

With `--trace FILE` the times of all steps are written there at the end: int64 [steps, 5], columns TRACE, of the clock
time.monotonic_ns, which is one for all processes of the machine.
"""

import argparse
import ctypes
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manta.configs.model import ModelSpec
from manta.configs.schema import ServeConfig
from manta.protos import worker_pb2 as pb
from manta.workers.parent import watch_parent

TRACE = ("step", "taken_ns", "start_ns", "end_ns", "answered_ns")
NUM_BLOCKS = 100_000
_SPIN_NS = 20_000
_PR_SET_TIMERSLACK = 29


@dataclass(frozen=True, slots=True)
class Placement:
    """What `workers.rank.Placement` holds."""

    tp_rank: int
    pp_rank: int
    num_workers_on_host: int
    rendezvous_host: str
    rendezvous_port: int
    store: Any
    meeting: str = ""


@dataclass(frozen=True, slots=True)
class StepTime:
    device_us: int
    idle_us: int


class FakeStep:
    """One step on its way through the device."""

    def __init__(self, trace: list[int], idle_us: int, tokens: bytes) -> None:
        self._trace = trace
        self._idle_us = idle_us
        self._tokens = tokens

    def time(self) -> StepTime:
        """Waits until the device is through with the step."""
        end_ns = self._trace[3]
        while (left_ns := end_ns - time.monotonic_ns()) > 0:
            if left_ns > _SPIN_NS:
                time.sleep((left_ns - _SPIN_NS) * 1e-9)
        self._trace[4] = time.monotonic_ns()
        return StepTime((end_ns - self._trace[2]) // 1000, self._idle_us)

    def tokens(self) -> bytes:
        return self._tokens

    def logprobs(self) -> bytes:
        return b""

    def vectors(self) -> bytes:
        return b""


class FakeRunner:
    """Slots as columns; follows the rules in protos/worker.proto."""

    blocks = None  # it has none that could be copied

    def __init__(self, config: ServeConfig, is_output_rank: bool, vocab_size: int) -> None:
        self.is_output_rank = is_output_rank
        self.trace: list[list[int]] = []
        self._tokens = np.random.default_rng(0).integers(3, vocab_size, 100_003 + config.max_num_seqs).astype("<i4")
        self._step_us = np.zeros(config.max_num_seqs, np.int64)
        self._lengths = np.zeros(config.max_num_seqs, np.int64)
        self._limits = np.zeros(config.max_num_seqs, np.int64)
        self._lanes = np.full(config.max_num_seqs, -1)
        self._decoding = np.zeros(config.max_num_seqs, np.bool_)
        self._missing = np.zeros(config.max_num_seqs, np.int64)  # prompt tokens not computed yet
        self._end_ns = 0
        self.clear()

    def clear(self) -> None:
        self._lanes[:] = -1
        self._decoding[:] = False

    def use_idle_time(self) -> bool:
        return False

    def run(self, plan: pb.StepPlan) -> FakeStep:
        """Launches the step: returns at once."""
        taken_ns = time.monotonic_ns()
        start_ns = max(taken_ns, self._end_ns)
        idle_us = (start_ns - self._end_ns) // 1000 if self._end_ns else 0
        num_sampled = self._apply(plan)
        self._end_ns = start_ns + int(self._step_us.max()) * 1000
        record = [plan.step, taken_ns, start_ns, self._end_ns, 0]
        self.trace.append(record)
        first = 257 * plan.step % 100_003  # other tokens in every step
        return FakeStep(record, min(idle_us, 2**32 - 1), self._tokens[first : first + num_sampled].tobytes())

    def _apply(self, plan: pb.StepPlan) -> int:
        """Returns the number of sampled tokens."""
        frees = np.frombuffer(plan.frees, "<u4")
        self._lanes[frees] = -1
        self._decoding[frees] = False
        for add in plan.adds:
            slot, num_tokens = add.slot, len(add.tokens) // 4
            self._lanes[slot] = add.lane
            self._lengths[slot], self._limits[slot] = num_tokens, add.max_length
            self._missing[slot] = num_tokens - add.num_computed
            self._step_us[slot] = add.sampling.seed
        rows = self._decoding & (self._lanes == plan.lane) & (self._lengths < self._limits)
        rows[np.frombuffer(plan.holds, "<u4")] = False
        self._lengths += rows
        prefills = np.frombuffer(plan.prefill_slots, "<u4")
        self._missing[prefills] -= np.frombuffer(plan.prefill_lengths, "<u4")
        begun = prefills[self._missing[prefills] == 0]
        self._decoding[begun] = True
        self._lengths[begun] += 1
        return int(np.count_nonzero(rows)) + len(begun)


class FakeRank:
    """What `workers.rank.load_rank` returns."""

    num_blocks = NUM_BLOCKS
    weight_bytes = 1
    bytes_per_block = 1
    load_s = profile_s = 0.0
    folder = None

    def __init__(self, config: ServeConfig, placement: Placement, peers: Sequence[str] = ()) -> None:
        self._config = config
        is_last_stage = placement.pp_rank == config.pipeline_parallel_size - 1
        self.runner = FakeRunner(config, is_last_stage and placement.tp_rank == 0, _spec(config).vocab_size)
        _ranks.append(self)

    def start(self, num_blocks: int) -> FakeRunner:
        return self.runner


_ranks: list[FakeRank] = []


def _spec(config: ServeConfig) -> ModelSpec:
    from manta.configs.model import read_model_spec

    return read_model_spec(Path(config.model))


def install() -> None:
    """Puts the clock where the worker service looks for torch and the model."""
    rank: Any = types.ModuleType("manta.workers.rank")
    rank.Placement, rank.load_rank, rank.device_name = Placement, FakeRank, lambda: "clock"
    rank.PlacementError = ValueError
    mesh: Any = types.ModuleType("manta.workers.mesh")
    mesh.open_store = lambda: (None, 1)
    sys.modules |= {"manta.workers.rank": rank, "manta.workers.mesh": mesh}


def write_trace(path: Path) -> None:
    if _ranks:
        columns: NDArray[np.int64] = np.array(_ranks[0].runner.trace, np.int64).reshape(-1, len(TRACE))
        np.save(path, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--parent-pid", type=int)
    args = parser.parse_args()
    install()
    from manta.workers.server import WorkerServer

    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)  # ns; threads started from here on inherit it
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    if args.parent_pid is not None:
        watch_parent(args.parent_pid, on_death=ended.set)
    server = WorkerServer()
    print(f"MANTA_ADDRESS {server.start()}", flush=True)
    ended.wait()
    if args.trace is not None:
        write_trace(args.trace)
    os._exit(0)


if __name__ == "__main__":
    main()
