"""Who takes which request: Manta's one queue beside requests that are bound to a replica when they arrive.

    python bench/routing.py ../shared/traces/mooncake_conversation_trace.jsonl

Replays recorded conversations (Qin et al., "Mooncake", FAST 2025), whose prompts share prefixes, on real schedulers
with workers that only take time (virtual.py). Lengths are divided by --shrink, and so are the blocks of the trace: 512
tokens become 64, which are four KV blocks. Prints how much of the prompts was found in prefix indexes and the time to
the first token, for each load and policy:

    round robin    a scheduler per replica, requests in turn
    least loaded   a scheduler per replica, requests to that with the fewest requests
    first come     one scheduler; whichever replica plans first takes the head of the queue
    manta          one scheduler, as it is
"""

import argparse
import gc
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from virtual import StepTime, VirtualCluster

from manta.cluster.bench.trace import BLOCK_LEN, TraceShape, trace_samples
from manta.scheduler.scheduler import Scheduler
from manta.scheduler.types import Capacity, Request

BLOCK_SIZE = 16
POLICIES = ["round robin", "least loaded", "first come", "manta"]


@dataclass(frozen=True, slots=True)
class Outcome:
    hit_rate: float
    ttft_s: NDArray[np.float64]
    plan_us: float  # processor time of plans, per step


def read_requests(path: Path, num_requests: int, shrink: int) -> list[tuple[float, Request]]:
    """Requests and the seconds at which they arrive, at the rate of the trace."""
    vocabulary = np.arange(10, 30_000, dtype=np.int32)
    samples = trace_samples(path, vocabulary, num_requests, TraceShape(length_scale=1 / shrink), seed=0)
    return [
        (sample.arrival_s, Request(id, np.asarray(sample.token_ids, np.int32), sample.output_len))
        for id, sample in enumerate(samples)
    ]


def seen_before(requests: list[tuple[float, Request]]) -> float:
    """Share of the prompts' tokens in blocks that were in an earlier prompt, too."""
    seen: set[bytes] = set()
    num_hits = num_tokens = 0
    for _, request in requests:
        num_tokens += len(request.prompt)
        for end in range(BLOCK_SIZE, len(request.prompt), BLOCK_SIZE):
            # Blocks of the trace never occur behind different beginnings: the block alone will do.
            block = request.prompt[end - BLOCK_SIZE : end].tobytes()
            num_hits += BLOCK_SIZE * (block in seen)
            seen.add(block)
    return num_hits / num_tokens


def build(policy: str, num_replicas: int, capacity: Capacity, step_time: StepTime) -> VirtualCluster:
    if policy in ("manta", "first come"):
        scheduler = Scheduler([capacity] * num_replicas, max_num_queued_reqs=10**6)
        if policy == "first come":
            for planner in scheduler._planners:
                planner._placement = None
        return VirtualCluster([scheduler], num_replicas, lambda request: 0, step_time)
    schedulers = [Scheduler([capacity], max_num_queued_reqs=10**6) for _ in range(num_replicas)]
    turns = itertools.cycle(range(num_replicas))
    cluster = VirtualCluster(schedulers, 1, lambda request: next(turns), step_time)
    if policy == "least loaded":
        cluster.bind = lambda request: int(np.argmin(cluster.num_outstanding))
    return cluster


def replay(cluster: VirtualCluster, arrivals: list[tuple[float, Request]]) -> Outcome:
    cluster.run(arrivals)
    ttft_s = np.array([timeline.ttft_s for timeline in cluster.timelines.values()])
    assert len(ttft_s) == len(arrivals), "a request is lost"
    assert not np.isnan(ttft_s).any(), "a request did not start"
    counters = [scheduler.counters for scheduler in cluster.schedulers]
    hit_rate = sum(each.num_prefix_hits for each in counters) / sum(each.num_prefix_queries for each in counters)
    return Outcome(hit_rate, ttft_s, 1e6 * cluster.plan_s / cluster.num_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--num-requests", type=int, default=12_000)
    parser.add_argument("--num-replicas", type=int, default=4)
    parser.add_argument("--shrink", type=int, default=8, help="divides all lengths")
    parser.add_argument("--loads", type=float, nargs="*", default=[20, 40, 50, 60], help="requests per second")
    parser.add_argument("--policies", nargs="*", default=POLICIES)
    parser.add_argument("--num-blocks", type=int, default=32_768, help="of 16 tokens, per replica")
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--token-us", type=float, default=25.0)
    args = parser.parse_args()
    if BLOCK_LEN % args.shrink:
        parser.error(f"--shrink must divide {BLOCK_LEN}")
    requests = read_requests(args.trace, args.num_requests, args.shrink)
    longest = max(len(request.prompt) + request.max_tokens for _, request in requests) + 1
    capacity = Capacity(args.num_blocks, BLOCK_SIZE, args.max_num_seqs, args.max_num_batched_tokens, longest)
    step_time = StepTime(args.step_ms * 1e-3, args.token_us * 1e-6)
    rate = len(requests) / requests[-1][0]
    mean_prompt = np.mean([len(request.prompt) for _, request in requests])
    print(
        f"{len(requests)} requests, {mean_prompt:.0f} prompt tokens on average, {args.num_replicas} replicas of "
        f"{args.num_blocks} blocks; a step takes {args.step_ms} ms + {args.token_us} us per token.\n"
        f"{seen_before(requests):.1%} of the prompts were seen before: the limit of one endless cache.\n\n"
        f"| requests/s | policy | prefix hits | TTFT p50, ms | TTFT p99, ms | mean, ms | plans, us per step |\n"
        f"| --- | --- | --- | --- | --- | --- | --- |"
    )
    gc.disable()
    for load in args.loads:
        arrivals = [(arrival_s * rate / load, request) for arrival_s, request in requests]
        for policy in args.policies:
            outcome = replay(build(policy, args.num_replicas, capacity, step_time), arrivals)
            p50, p99 = 1e3 * np.percentile(outcome.ttft_s, [50, 99])
            print(
                f"| {load:g} | {policy} | {outcome.hit_rate:.1%} | {p50:,.0f} | {p99:,.0f} | "
                f"{1e3 * outcome.ttft_s.mean():,.0f} | {outcome.plan_us:.0f} |"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
