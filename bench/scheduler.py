"""Time of the scheduler itself: plan + apply of pure decode steps, and the admission of a long prompt.

    python bench/scheduler.py

Answers are made up beforehand, so only the scheduler's own work is measured, prefix caching on. The mean covers
steps in which sequences take and publish blocks; the median is the step of a quiet moment.
"""

import argparse
import gc
import statistics
import time
from collections import deque

import numpy as np

from manta.scheduler.scheduler import Scheduler
from manta.scheduler.types import Capacity, Request, StepPlan, StepResult

BLOCK_SIZE = 16
STOP_TOKEN = 2


def prompt(rng: np.random.Generator, num_tokens: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return rng.integers(10, 100_000, num_tokens).astype(np.int32)


def result_of(plan: StepPlan, num_sampled: int, tokens: np.ndarray[tuple[int], np.dtype[np.int32]]) -> StepResult:
    return StepResult(plan.epoch, plan.step, tokens[:num_sampled])


def bench_decode(num_running: int, num_steps: int) -> list[float]:
    """Seconds of each plan + apply with two plans in flight."""
    rng = np.random.default_rng(0)
    max_length = 128 + 64 + num_steps
    num_blocks = num_running * (max_length // BLOCK_SIZE + 2)
    capacity = Capacity(num_blocks, BLOCK_SIZE, num_running, max(2048, num_running * 2), max_length * 2)
    scheduler = Scheduler([capacity], max_num_queued_reqs=num_running)
    for i in range(num_running):  # lengths differ, so that block boundaries are spread over steps
        tokens = prompt(rng, 64 + i % BLOCK_SIZE)
        scheduler.add(Request(i, tokens, max_tokens=max_length, stop_token_ids=frozenset({STOP_TOKEN})))
    answers = prompt(rng, 2 * num_running)
    in_flight: deque[StepResult] = deque()

    def send() -> int:
        plan = scheduler.plan()
        assert plan is not None
        num_sampled = scheduler._replicas[0].in_flight[-1].num_sampled
        in_flight.append(result_of(plan, num_sampled, answers))
        return plan.num_decodes

    while send() < num_running:
        if scheduler.num_in_flight() == capacity.max_in_flight:
            scheduler.apply(in_flight.popleft())
    while len(in_flight) > 1:
        scheduler.apply(in_flight.popleft())

    times = []
    for _ in range(num_steps):
        begin = time.perf_counter()
        plan = scheduler.plan()
        planned = time.perf_counter()
        assert plan is not None
        in_flight.append(result_of(plan, num_running, answers))
        result = in_flight.popleft()
        answered = time.perf_counter()
        events = scheduler.apply(result)
        times.append(time.perf_counter() - answered + planned - begin)
        assert len(events.tokens) == num_running
    scheduler.check()
    return times


def bench_admission(num_tokens: int, repeats: int, shared: bool) -> list[float]:
    """Seconds of add + plan of a prompt that is new, or whose blocks are all cached."""
    rng = np.random.default_rng(0)
    capacity = Capacity(4096 * 4, BLOCK_SIZE, 64, num_tokens, num_tokens + 64)
    scheduler = Scheduler([capacity])
    same = prompt(rng, num_tokens)
    times = []
    for i in range(repeats + 1):
        request = Request(i, same if shared else prompt(rng, num_tokens), max_tokens=1)
        begin = time.perf_counter()
        scheduler.add(request)
        plan = scheduler.plan()
        times.append(time.perf_counter() - begin)
        assert plan is not None
        scheduler.apply(result_of(plan, 1, same))
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-running", type=int, nargs="+", default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--num-steps", type=int, default=800)
    args = parser.parse_args()
    gc.disable()
    print(f"plan + apply of a pure decode step, us ({args.num_steps} steps, prefix caching on)")
    print(f"{'running':>8} {'mean':>8} {'median':>8} {'p99':>8}")
    for num_running in args.num_running:
        us = sorted(1e6 * seconds for seconds in bench_decode(num_running, args.num_steps))
        p99 = us[int(0.99 * len(us))]
        print(f"{num_running:>8} {statistics.fmean(us):>8.1f} {statistics.median(us):>8.1f} {p99:>8.1f}")
    for name, shared in (("new", False), ("all cached", True)):
        us_median = 1e6 * statistics.median(bench_admission(2048, 50, shared))
        print(f"admission of a 2,048-token prompt, {name}: {us_median:.0f} us (add + plan, median)")


if __name__ == "__main__":
    main()
