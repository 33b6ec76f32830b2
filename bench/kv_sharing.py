"""How many KV blocks are saved because the samples of a prompt, and the beams of a search, share them.

    python bench/kv_sharing.py

Requests with lengths like ShareGPT's (see bench/kv_waste.py) are queued at once and run through the real scheduler, two
plans in flight, without prefix caching, so that nothing is shared but within a request. Each asks for n samples, or for
a beam search of that width; every sequence gets the length of its request. After each plan, the blocks in the tables of
all sequences are counted as often as they are there, which is what they would need without sharing, and once each. The
share saved is the difference over the former, averaged over the steps while requests wait (after that, only those with
the longest outputs are left), as in Kwon et al., "Efficient Memory Management for
Large Language Model Serving with PagedAttention" (SOSP 2023), section 6.3: there 16.2 to 30.5 % for 2 to 6 samples and
44.3 to 66.3 % for beams of width 2 to 6, on ShareGPT.

No model runs: each beam's best tokens come from logits that are drawn anew for each step, normal with the standard
deviation --sigma over --vocab-size tokens. With a sharp distribution (large sigma) beams differ for longer, because one
goes on from another only where its second best token is better than the other's best.
"""

import argparse
from collections import deque
from collections.abc import Callable

import numpy as np
from kv_waste import Lengths, capped, made_up_lengths

from manta.scheduler.beam_search import BeamParams
from manta.scheduler.replica import Replica
from manta.scheduler.scheduler import Scheduler
from manta.scheduler.types import Capacity, Request, StepResult

_VOCAB_SIZE = 30_000  # of the prompts
Measure = Callable[[Replica], float]


class Model:
    """Answers in place of workers. `sigma`: of the logits of `vocab_size` tokens."""

    def __init__(self, rng: np.random.Generator, sigma: float, vocab_size: int) -> None:
        self._rng = rng
        self._sigma = sigma
        self._vocab_size = vocab_size

    def answer(self, replica: Replica, epoch: int) -> StepResult:
        """To the plan that was made last."""
        step = replica.in_flight[-1]
        widths = [
            prefill.sequence.request.num_logprobs
            for prefill in step.prefills.values()
            if prefill.samples and prefill.sequence.beam is not None
        ]
        tokens = self._rng.integers(10, _VOCAB_SIZE, step.num_sampled).astype(np.int32)
        if not widths:
            return StepResult(epoch, step.step, tokens)
        assert widths[0] is not None
        return StepResult(epoch, step.step, tokens, self._records(len(widths), widths[0]))

    def _records(self, num_rows: int, num_best: int) -> bytes:
        """As in protos/worker.proto: of each row's token nothing, and its best tokens."""
        logits = self._rng.normal(0.0, self._sigma, (num_rows, self._vocab_size))
        logprobs = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype("<f4")
        ids = np.argsort(-logprobs, axis=1)[:, :num_best].astype("<i4")
        best = np.take_along_axis(logprobs, ids, axis=1).view("<i4")
        return np.concatenate([np.zeros((num_rows, 2), "<i4"), ids, best], axis=1).tobytes()


def shares_saved(
    lengths: Lengths, capacity: Capacity, width: int, is_beam: bool, model: Model, measure: Measure
) -> list[float]:
    """After each plan, as long as requests wait: what `measure` says."""
    scheduler = Scheduler([capacity], max_num_queued_reqs=len(lengths), enable_prefix_caching=False)
    rng = np.random.default_rng(1)
    for index, (prompt_len, output_len) in enumerate(lengths):
        prompt = rng.integers(10, _VOCAB_SIZE, prompt_len).astype(np.int32)
        requests = [Request(index * width + i, prompt, max_tokens=int(output_len)) for i in range(width)]
        if is_beam:
            scheduler.add_search(requests, BeamParams(width, width))
        else:
            scheduler.add_group(requests)
    replica = scheduler._replicas[0]
    saved: list[float] = []
    in_flight: deque[StepResult] = deque()
    while True:
        plan = scheduler.plan()
        if plan is not None:
            in_flight.append(model.answer(replica, plan.epoch))
            if scheduler.num_waiting:
                saved.append(measure(replica))
        if len(in_flight) == capacity.max_in_flight or plan is None:
            if not in_flight:
                break
            scheduler.apply(in_flight.popleft())
    scheduler.check()
    return saved


def share_saved(replica: Replica) -> float:
    """(blocks without sharing - blocks used) / blocks without sharing."""
    tables = [sequence.blocks for sequence in [*replica.residents.values(), *replica.parked]]
    num_alone = sum(map(len, tables))
    return 1 - len({block for table in tables for block in table}) / num_alone


def share_possible(replica: Replica) -> float:
    """As share_saved, of tokens instead of blocks, if samples of a prompt shared every token of it."""
    num_shared = num_alone = 0
    seen: set[int] = set()
    for sequence in replica.residents.values():
        num_alone += replica.planned_length(sequence)
        num_shared += len(sequence.request.prompt) if id(sequence.group) in seen else 0
        seen.add(id(sequence.group))
    return num_shared / num_alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-requests", type=int, default=1000, help="of n samples each")
    parser.add_argument("--num-searches", type=int, default=200, help="which take longer: the first of the requests")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-num-seqs", type=int, default=96)
    parser.add_argument("--kv-tokens", type=int, default=131_072, help="slots in the pool")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--sigmas", type=float, nargs="*", default=[4.0])
    parser.add_argument("--vocab-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    lengths = capped(made_up_lengths(rng, args.num_requests), args.max_model_len)
    mean_prompt, mean_output = lengths.mean(axis=0)
    print(f"{len(lengths)} requests, mean prompt {mean_prompt:.0f}, mean output {mean_output:.0f} tokens")
    print(f"share of KV blocks saved by sharing, mean over steps, blocks of {args.block_size}")
    print(f"{'':<22} " + " ".join(f"{width:>8}" for width in args.widths))
    capacity = Capacity(args.kv_tokens // args.block_size, args.block_size, args.max_num_seqs, 2048, args.max_model_len)
    kinds: list[tuple[str, bool, float, Measure]] = [
        ("samples", False, 0.0, share_saved),
        ("if all was shared", False, 0.0, share_possible),
        *((f"beams, sigma {sigma:g}", True, sigma, share_saved) for sigma in args.sigmas),
    ]
    for name, is_beam, sigma, measure in kinds:
        model = Model(rng, sigma, args.vocab_size)
        some = lengths[: args.num_searches] if is_beam else lengths
        shares = [np.mean(shares_saved(some, capacity, width, is_beam, model, measure)) for width in args.widths]
        print(f"{name:<22} " + " ".join(f"{share:>8.1%}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
