"""How many KV slots, each for one token's keys and values, are allocated and hold nothing; and what reserving wastes.

    python bench/kv_waste.py                                          # made-up lengths, like ShareGPT's
    python bench/kv_waste.py --trace AzureLLMInferenceTrace_conv.csv  # github.com/Azure/AzurePublicDataset

All requests are queued at once and run through the real scheduler, two plans in flight, with answers made up here,
until the last has ended. After each plan every block that no other request could take now counts as allocated: those in
block tables, and freed ones that a step under way may still touch. A slot is used once a plan that has been sent
computes it. Waste is the rest, summed over steps.

The other rows reserve room for each of the same running requests when it begins: for the whole context, for prompt and
output with the output rounded up to a power of two, and for exactly what it will need, which nobody knows. Kwon et al.,
"Efficient Memory Management for Large Language Model Serving with PagedAttention" (SOSP 2023), compare with the same
three, and give ShareGPT's mean lengths: 161 in, 338 out.
"""

import argparse
import csv
from collections import Counter, deque
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from manta.scheduler.replica import Replica
from manta.scheduler.scheduler import Scheduler
from manta.scheduler.sequence import Sequence, Status
from manta.scheduler.types import Capacity, Request, StepResult

Lengths = NDArray[np.int64]  # [num_requests, 2]: prompt, output
_SHAREGPT_MEANS = (161, 338)
_SHAREGPT_SIGMAS = (1.25, 1.0)  # of the logarithm
_VOCAB_SIZE = 30_000


def made_up_lengths(rng: np.random.Generator, num_requests: int) -> Lengths:
    """Log-normal with ShareGPT's means."""
    sigmas = np.array(_SHAREGPT_SIGMAS)
    lengths = rng.lognormal(np.log(_SHAREGPT_MEANS) - sigmas**2 / 2, sigmas, (num_requests, 2))
    return np.maximum(lengths.astype(np.int64), 1)


def trace_lengths(path: Path, num_requests: int) -> Lengths:
    """The first requests of a trace in Azure's format."""
    with path.open(newline="") as file:
        rows = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    return np.maximum(np.array(rows[:num_requests], np.int64), 1)


def capped(lengths: Lengths, max_model_len: int) -> Lengths:
    """Prompts cut to what leaves room for an output, outputs to what the context then holds."""
    prompts = np.minimum(lengths[:, 0], max_model_len - 1)
    return np.stack([prompts, np.minimum(lengths[:, 1], max_model_len - prompts)], axis=1)


def slots_per_step(lengths: Lengths, capacity: Capacity, rng: np.random.Generator) -> Counter[str]:
    """Slots summed over all steps: used, allocated, and what each way of reserving would have allocated."""
    scheduler = Scheduler([capacity], max_num_queued_reqs=len(lengths))
    for index, (prompt_len, output_len) in enumerate(lengths):
        prompt = rng.integers(10, _VOCAB_SIZE, prompt_len).astype(np.int32)
        scheduler.add(Request(index, prompt, max_tokens=int(output_len)))
    replica = scheduler._replicas[0]
    sums: Counter[str] = Counter()
    in_flight: deque[StepResult] = deque()
    while True:
        plan = scheduler.plan()
        if plan is not None:
            tokens = rng.integers(10, _VOCAB_SIZE, replica.in_flight[-1].num_sampled).astype(np.int32)
            in_flight.append(StepResult(plan.epoch, plan.step, tokens))
            sums += slots_now(replica)
            sums["steps"] += 1
        if len(in_flight) == capacity.max_in_flight or plan is None:
            if not in_flight:
                break
            scheduler.apply(in_flight.popleft())
    scheduler.check()
    return sums


def slots_now(replica: Replica) -> Counter[str]:
    """Slots after a plan: `used`, `paged` (allocated), and `max`, `pow2` and `exact`, which reserving would take."""
    capacity = replica.capacity
    now = Counter({"paged": (capacity.num_blocks - replica.pool.num_free) * capacity.block_size})
    for sequence in replica.residents.values():
        prompt_len, output_len = len(sequence.request.prompt), sequence.request.max_tokens
        now["used"] += _num_used(replica, sequence)
        now["max"] += capacity.max_model_len
        now["pow2"] += min(prompt_len + (1 << (output_len - 1).bit_length()), capacity.max_model_len)
        now["exact"] += prompt_len + output_len
    return now


def _num_used(replica: Replica, sequence: Sequence) -> int:
    """Tokens whose keys and values exist when the plans sent so far have run; prompts here share none."""
    if sequence.status is Status.PREFILLING:
        return sequence.num_planned
    return replica.planned_length(sequence) - 1  # the last token's are computed by the next step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="CSV with the columns ContextTokens and GeneratedTokens")
    parser.add_argument("--num-requests", type=int, default=2000)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--kv-tokens", type=int, default=131_072, help="slots in the pool")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    lengths = trace_lengths(args.trace, args.num_requests) if args.trace else made_up_lengths(rng, args.num_requests)
    lengths = capped(lengths, args.max_model_len)
    mean_prompt, mean_output = lengths.mean(axis=0)
    print(f"{len(lengths)} requests, mean prompt {mean_prompt:.0f}, mean output {mean_output:.0f} tokens")
    print("KV slots allocated and not used")
    sums: Counter[str] = Counter()
    for block_size in args.block_sizes:
        capacity = Capacity(
            args.kv_tokens // block_size, block_size, args.max_num_seqs, args.max_num_batched_tokens, args.max_model_len
        )
        sums = slots_per_step(lengths, capacity, rng)
        print_row(f"paged, blocks of {block_size} ({sums['steps']} steps)", waste(sums, "paged"))
    print_row("reserving prompt + output, if outputs were known", waste(sums, "exact"))
    print_row("reserving prompt + output to a power of two", waste(sums, "pow2"))
    print_row(f"reserving the context of {args.max_model_len}", waste(sums, "max"))


def waste(sums: Counter[str], kind: str) -> float:
    """Share of the allocated slots, 0 to 1."""
    return 1 - sums["used"] / sums[kind]


def print_row(name: str, share: float) -> None:
    print(f"{name:<50} {share:>7.2%}")


if __name__ == "__main__":
    main()
