"""What a tenant feels of a neighbour that sends a hundred times as much.

    python bench/fairness.py

A light tenant sends a request a second; a noisy one sends --noise times as many, more than the replicas can do, for as
long as the run takes. Real schedulers, workers that only take time (virtual.py). Prints the light tenant's time to the
first token alone and beside the noisy one, first come first served and under the "fair" policy, for several token
budgets: whoever comes waits for the steps that are planned, and these are as long as the budget lets them be. What that
costs the others is in the last column: tokens computed per second, of those computed first come first served.
"""

import argparse
import gc
import sys

import numpy as np
from virtual import StepTime, VirtualCluster

from manta.scheduler.scheduler import Policy, Scheduler
from manta.scheduler.types import Capacity, Request

LIGHT, NOISY = "light", "noisy"


def poisson(
    rng: np.random.Generator, tenant: str, rate: float, until_s: float, prompt: tuple[int, int], output: tuple[int, int]
) -> list[tuple[float, Request]]:
    """Requests of one tenant, in the order of their arrival; ids are even for the light one."""
    arrivals = []
    now_s, id = rng.exponential(1 / rate), int(tenant != LIGHT)
    while now_s < until_s:
        tokens = rng.integers(10, 30_000, rng.integers(prompt[0], prompt[1] + 1)).astype(np.int32)
        max_tokens = int(rng.integers(output[0], output[1] + 1))
        arrivals.append((now_s, Request(id, tokens, max_tokens, tenant=tenant)))
        now_s += rng.exponential(1 / rate)
        id += 2
    return arrivals


def light_ttft_ms(cluster: VirtualCluster, arrivals: list[tuple[float, Request]], until_s: float) -> tuple[str, float]:
    """A row's cells for the light tenant, and its p99. Who is refused or still waits counts as infinite."""
    cluster.run(arrivals, until_s)
    of_light = [request.id for _, request in arrivals if request.tenant == LIGHT]
    timelines = [cluster.timelines[id] for id in of_light]
    ttft_ms = np.array([1e3 * each.ttft_s for each in timelines])
    ttft_ms = np.where(np.isnan(ttft_ms), np.inf, ttft_ms)
    p50, p99 = np.percentile(ttft_ms, [50, 99], method="higher")
    num_refused = sum(each.is_refused for each in timelines)
    return f"{_ms(p50)} | {_ms(p99)} | {num_refused}/{len(timelines)}", float(p99)


def _ms(value: float) -> str:
    return f"{value:,.0f}" if np.isfinite(value) else "never"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, default=100.0, help="times the light tenant's rate")
    parser.add_argument("--duration-s", type=float, default=300.0)
    parser.add_argument("--num-replicas", type=int, default=2)
    parser.add_argument("--budgets", type=int, nargs="*", default=[2048, 1024, 512])
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--prompt", type=int, nargs=2, default=[512, 1536])
    parser.add_argument("--output", type=int, nargs=2, default=[64, 256])
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--token-us", type=float, default=25.0)
    parser.add_argument("--round-trip-ms", type=float, default=1.0)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = tuple(args.prompt), tuple(args.output)
    light = poisson(rng, LIGHT, 1.0, args.duration_s - 5, *shape)
    noisy = poisson(rng, NOISY, args.noise, args.duration_s, *shape)
    print(
        f"Prompts of {args.prompt[0]} to {args.prompt[1]} tokens, outputs of {args.output[0]} to {args.output[1]}; "
        f"{args.num_replicas} replicas, {args.duration_s:g} s; a step takes {args.step_ms} ms + {args.token_us} us per "
        f"token, and {args.round_trip_ms} ms from its end to the next if that is not planned\n\n"
        f"| budget | policy | neighbour | TTFT p50, ms | TTFT p99, ms | refused | p99, of alone | tokens/s, of fcfs |\n"
        f"| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    gc.disable()
    rows: list[tuple[Policy, str]] = [("fcfs", "none"), ("fcfs", "100x"), ("fair", "100x")]
    for budget in args.budgets:
        capacity = Capacity(40_000, 16, args.max_num_seqs, budget, sum(map(max, shape)) + 1)
        alone_ms = fcfs_tokens = float("nan")
        for policy, neighbour in rows:
            scheduler = Scheduler([capacity] * args.num_replicas, policy=policy)
            step_time = StepTime(args.step_ms * 1e-3, args.token_us * 1e-6, args.round_trip_ms * 1e-3)
            cluster = VirtualCluster([scheduler], args.num_replicas, lambda request: 0, step_time)
            cells, p99_ms = light_ttft_ms(cluster, light + (noisy if neighbour != "none" else []), args.duration_s)
            if neighbour == "none":
                alone_ms = p99_ms
            elif policy == "fcfs":
                fcfs_tokens = cluster.num_tokens
            ratio = f"{p99_ms / alone_ms:.2f}" if np.isfinite(p99_ms) else "-"
            cost = "-" if neighbour == "none" else f"{cluster.num_tokens / fcfs_tokens:.2f}"
            print(
                f"| {budget} | {policy} | {neighbour.replace('100', f'{args.noise:g}')} | {cells} | {ratio} | {cost} |"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
