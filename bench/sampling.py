"""What choosing tokens costs on a CPU: the kernel beside the same in torch's operations (which GPUs run).

    python bench/sampling.py [--threads 2] [--vocab 49152 151936] [--rows 1 16 64] [--flat] [--busy 2]

Logits fall off as word frequencies do (Zipf), with noise; --flat: normally distributed, as random weights give them,
where top_p keeps most of the vocabulary. --busy: beside so many processes that never stop. Medians.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from manta.kernels.cpu_decoder.memory import zeros
from manta.kernels.cpu_decoder.team import team_of
from manta.protos.sampling_pb2 import Sampling
from manta.workers.sampler import Sampler
from manta.workers.sampling_table import SamplingTable
from manta.workers.token_table import TokenTable

CASES: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50, top_p 0.9, min_p 0.05": {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "half of the rows greedy": {},
}
PROMPT_TOKENS, OUTPUT_TOKENS = 200, 100
SECONDS_PER_CASE = 0.3


def make_sampler(fields: dict[str, float], num_rows: int, vocab_size: int, half_greedy: bool) -> Sampler:
    """A sampler of num_rows slots with sequences of PROMPT_TOKENS + OUTPUT_TOKENS."""
    tokens, table = TokenTable(torch.device("cpu")), SamplingTable(vocab_size)
    generator = np.random.default_rng(0)
    length = PROMPT_TOKENS + OUTPUT_TOKENS
    tokens.reserve(num_rows, length)
    for slot in range(num_rows):
        tokens.write(slot, generator.integers(0, vocab_size, length, np.int32))
        row = {"temperature": 0.8, "top_p": 1.0, "repetition_penalty": 1.0} | fields
        if half_greedy and slot % 2 == 0:
            row["temperature"] = 0.0
        row["top_k"] = int(row.get("top_k", 0))
        table.set(slot, Sampling(**row, seed=slot), PROMPT_TOKENS)  # type: ignore[arg-type]
    return Sampler(table, tokens)


def make_logits(num_rows: int, vocab_size: int, flat: bool) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(num_rows, vocab_size, generator=generator)
    if flat:
        return noise
    order = torch.argsort(torch.rand(num_rows, vocab_size, generator=generator), dim=1)
    return noise - 1.5 * torch.log(1.0 + order)


def median_ms(function: Callable[[], object], prepare: Callable[[], object]) -> float:
    """Of as many calls as fit into SECONDS_PER_CASE, after two that are not counted."""
    taken_s: list[float] = []
    until_s = time.perf_counter() + SECONDS_PER_CASE
    while len(taken_s) < 7 or time.perf_counter() < until_s:
        prepare()
        started_s = time.perf_counter()
        function()
        taken_s.append(time.perf_counter() - started_s)
    return 1000 * float(np.median(taken_s[2:]))


@torch.inference_mode()
def measure(sampler: Sampler, logits: Tensor) -> tuple[float, float, float]:
    """Median ms of torch's operations and of the kernel, and the share of equal tokens."""
    slots = np.arange(logits.shape[0])
    positions = np.full(logits.shape[0], PROMPT_TOKENS + OUTPUT_TOKENS)
    given = zeros(tuple(logits.shape), torch.float32)  # as the engine's are

    def prepare() -> None:
        np.copyto(given.numpy(), logits.numpy())  # by one thread: OpenMP's would spin on for milliseconds

    chosen, medians = [], []
    for function in (sampler._sample_in_torch, sampler.sample):
        prepare()
        chosen.append(function(given, slots, positions))
        medians.append(median_ms(lambda function=function: function(given, slots, positions), prepare))  # type: ignore[misc]
        time.sleep(0.05)  # until threads sleep
    return medians[0], medians[1], float((chosen[0] == chosen[1]).double().mean())


def spin() -> None:
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--vocab", type=int, nargs="+", default=[49_152, 151_936])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--flat", action="store_true")
    parser.add_argument("--busy", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    team_of(arguments.threads, torch.float32, uses_dot=False)
    others = [multiprocessing.Process(target=spin, daemon=True) for _ in range(arguments.busy)]
    for other in others:
        other.start()
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.busy} busy processes")
    print("| vocabulary | rows | sampling | torch, ms | kernel, ms | us a row | ratio | equal tokens |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for vocab_size in arguments.vocab:
        for num_rows in arguments.rows:
            logits = make_logits(num_rows, vocab_size, arguments.flat)
            for name, fields in CASES.items():
                sampler = make_sampler(fields, num_rows, vocab_size, name.startswith("half"))
                before, after, equal = measure(sampler, logits)
                print(
                    f"| {vocab_size:,} | {num_rows} | {name} | {before:.3f} | {after:.3f} "
                    f"| {1000 * after / num_rows:.0f} | {before / after:.1f} | {equal:.2f} |",
                    flush=True,
                )
    for other in others:
        other.terminate()
        other.join()


if __name__ == "__main__":
    main()
