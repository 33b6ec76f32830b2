"""Seconds of work on a device."""

import statistics
import time
from collections.abc import Callable

import torch

_FLUSH_BYTES = 256 * 2**20  # more than any level-2 cache
_SLEEP_CYCLES = 2_000_000  # about 1 ms, in which the host launches what is timed


def median_s(run: Callable[[], object], device: torch.device, repeats: int = 20, warmups: int = 3) -> float:
    """Median of `repeats` runs, each with cold caches on a GPU; its launch does not count there."""
    for _ in range(warmups):
        run()
    if device.type != "cuda":
        times_s = []
        for _ in range(repeats):
            begin_s = time.perf_counter()
            run()
            times_s.append(time.perf_counter() - begin_s)
        return statistics.median(times_s)
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    events = []
    for _ in range(repeats):
        flush.zero_()
        torch.cuda._sleep(_SLEEP_CYCLES)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
