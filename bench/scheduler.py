"""Time of the scheduler itself: plan + apply of pure decode steps, and all it does for a long prompt.

    python bench/scheduler.py

Answers are made up beforehand, so only the scheduler's own work is measured: prefix caching on, two plans in flight,
and a pool full of what earlier requests left, so that each block taken pushes another one out of the prefix index.
The mean covers steps in which sequences take, hash and publish blocks; the median is the step of a quiet moment.
"""

import argparse
import gc
import statistics
import time
from collections import deque
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from manta.scheduler.scheduler import Scheduler
from manta.scheduler.types import Capacity, Request, StepPlan, StepResult

BLOCK_SIZE = 16
STOP_TOKEN = 2
PROMPT_TOKENS = 2048


def random_tokens(rng: np.random.Generator, num_tokens: int) -> NDArray[np.int32]:
    return rng.integers(10, 100_000, num_tokens).astype(np.int32)


class Driver:
    """A scheduler whose plans are answered with `answers`, oldest first."""

    def __init__(self, capacity: Capacity, answers: NDArray[np.int32]) -> None:
        self.scheduler = Scheduler([capacity], max_num_queued_reqs=capacity.max_num_seqs)
        self.answers = answers
        self.in_flight: deque[StepResult] = deque()
        self.num_requests = 0

    def add(self, tokens: NDArray[np.int32], max_tokens: int) -> None:
        self.num_requests += 1
        request = Request(self.num_requests, tokens, max_tokens, stop_token_ids=frozenset({STOP_TOKEN}))
        self.scheduler.add(request)

    def send(self) -> StepPlan | None:
        plan = self.scheduler.plan()
        if plan is not None:
            num_sampled = self.scheduler._replicas[0].in_flight[-1].num_sampled
            self.in_flight.append(StepResult(plan.epoch, plan.step, self.answers[:num_sampled]))
        return plan

    def deliver(self) -> None:
        self.scheduler.apply(self.in_flight.popleft())

    def run(self) -> None:
        """Until nothing is left to do."""
        while self.send() is not None:
            self.deliver()

    def fill_pool(self, rng: np.random.Generator, num_blocks: int, tokens_per_prompt: int) -> None:
        """Leaves every block published and unused."""
        while num_blocks > 0:
            self.add(random_tokens(rng, min(num_blocks * BLOCK_SIZE, tokens_per_prompt)), max_tokens=1)
            self.run()
            num_blocks -= tokens_per_prompt // BLOCK_SIZE


def decode_steps(num_running: int, num_steps: int) -> list[float]:
    """Microseconds of each plan + apply."""
    rng = np.random.default_rng(0)
    max_length = 128 + 64 + num_steps
    num_blocks = num_running * (max_length // BLOCK_SIZE + 2)
    budget = max(PROMPT_TOKENS, num_running * 2)
    driver = Driver(
        Capacity(num_blocks, BLOCK_SIZE, num_running, budget, max_length * 2), random_tokens(rng, num_running * 2)
    )
    driver.fill_pool(rng, num_blocks, min(budget, max_length))
    for i in range(num_running):  # lengths differ, so that block boundaries are spread over steps
        driver.add(random_tokens(rng, 64 + i % BLOCK_SIZE), max_tokens=max_length)
    while (plan := driver.send()) is None or plan.num_decodes < num_running:
        driver.deliver()
    while len(driver.in_flight) > 1:
        driver.deliver()
    gc.collect()

    times = []
    for _ in range(num_steps):
        begin = time.perf_counter()
        plan = driver.scheduler.plan()
        planned = time.perf_counter()
        assert plan is not None
        driver.in_flight.append(StepResult(plan.epoch, plan.step, driver.answers[:num_running]))
        result = driver.in_flight.popleft()
        answered = time.perf_counter()
        events = driver.scheduler.apply(result)
        times.append(1e6 * (time.perf_counter() - answered + planned - begin))
        assert len(events.tokens) == num_running
    driver.scheduler.check()
    return times


@dataclass
class AdmissionCost:
    """Microseconds for one prompt; hashing and publishing happen in plan and in apply."""

    add: float
    plan: float
    apply: float

    @property
    def total(self) -> float:
        return self.add + self.plan + self.apply


def admissions(cached_share: float, repeats: int) -> list[AdmissionCost]:
    """Cost of prompts computed in one step, of which the first `cached_share` is in the prefix index."""
    rng = np.random.default_rng(0)
    num_blocks = 16 * PROMPT_TOKENS // BLOCK_SIZE
    driver = Driver(Capacity(num_blocks, BLOCK_SIZE, 64, PROMPT_TOKENS, PROMPT_TOKENS * 2), random_tokens(rng, 64))
    driver.fill_pool(rng, num_blocks, PROMPT_TOKENS)
    same = random_tokens(rng, int(cached_share * PROMPT_TOKENS))
    costs = []
    for _ in range(repeats + 1):
        tokens = np.concatenate([same, random_tokens(rng, PROMPT_TOKENS - len(same))])
        marks = [time.perf_counter()]
        driver.add(tokens, max_tokens=2)
        marks.append(time.perf_counter())
        driver.send()
        marks.append(time.perf_counter())
        driver.deliver()
        marks.append(time.perf_counter())
        costs.append(AdmissionCost(*(1e6 * (after - before) for before, after in pairwise(marks))))
        driver.run()
    driver.scheduler.check()
    return costs[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-running", type=int, nargs="*", default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--num-steps", type=int, default=800)
    args = parser.parse_args()
    gc.disable()
    print(f"plan + apply of a pure decode step, us ({args.num_steps} steps, block size {BLOCK_SIZE})")
    print(f"{'running':>8} {'mean':>8} {'p50':>8} {'p99':>8} {'per request':>12}")
    for num_running in args.num_running:
        us = sorted(decode_steps(num_running, args.num_steps))
        mean, p99 = statistics.fmean(us), us[int(0.99 * len(us))]
        print(f"{num_running:>8} {mean:>8.1f} {statistics.median(us):>8.1f} {p99:>8.1f} {mean / num_running:>12.3f}")
    print(
        f"\na prompt of {PROMPT_TOKENS:,} tokens until its first token, all hashing and publishing included, us (p50)"
    )
    print(f"{'cached':>8} {'add':>8} {'plan':>8} {'apply':>8} {'total':>8} {'p99':>8}")
    for name, share in (("none", 0.0), ("half", 0.5), ("all", 1.0)):
        costs = admissions(share, 200)
        p50 = [statistics.median(getattr(cost, part) for cost in costs) for part in ("add", "plan", "apply", "total")]
        p99 = sorted(cost.total for cost in costs)[int(0.99 * len(costs))]
        print(f"{name:>8} " + " ".join(f"{us:>8.1f}" for us in [*p50, p99]))


if __name__ == "__main__":
    main()
