"""`manta bench latency`: seconds from giving one batch to the engine in this process until all of it is finished."""

import argparse
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from manta.cluster.bench.dataset_flags import COUNT, LENGTH, add_flag
from manta.cluster.bench.engine_flags import (
    add_engine_flags,
    add_run_flags,
    check_json,
    engine_settings,
    model_prompts,
    open_engine,
    sampling_of,
    write_json,
)
from manta.cluster.bench.errors import BenchError
from manta.cluster.bench.samples import fit_to_model, random_samples
from manta.cluster.cli.flags import Parser
from manta.cluster.engine.types import EngineError
from manta.configs.sampling import SamplingParams

_PERCENTILES = (10, 25, 50, 75, 90, 99)


def latency_parser() -> argparse.ArgumentParser:
    """The parser; its errors are UsageErrors of one sentence."""
    parser = Parser(
        prog="manta bench latency",
        usage="manta bench latency --model MODEL [flags]",
        description="Measure how long one batch takes, without a server.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("Benchmark")
    add_flag(group, "--input-len", "tokens of each prompt", 32, type=COUNT, metavar="N")
    add_flag(group, "--output-len", "tokens generated for each", 128, type=COUNT, metavar="N")
    add_flag(group, "--batch-size", "prompts", 8, type=COUNT, metavar="N")
    add_flag(group, "--num-iters-warmup", "runs before the measured ones", 10, type=LENGTH, metavar="N")
    add_flag(group, "--num-iters", "measured runs", 30, type=COUNT, metavar="N")
    add_flag(group, "--seed", "same seed, same prompts", 0, type=LENGTH, metavar="N")
    add_run_flags(group)
    # The same prompts run again and again: the prefix cache would leave nothing of their prefill.
    add_engine_flags(parser, enable_prefix_caching=False)
    return parser


def bench_latency(args: argparse.Namespace) -> int:
    """Runs the benchmark; returns 0. Raises BenchError or UsageError."""
    check_json(args.output_json)
    settings = engine_settings(args)
    params = sampling_of(args, args.output_len)
    model = model_prompts(settings)
    samples = random_samples(model.ids, args.batch_size, args.input_len, args.output_len, seed=args.seed)
    fit_to_model(samples, model.max_model_len, cuts=False)
    with open_engine(settings, not args.disable_detokenize) as llm:
        fit_to_model(samples, llm.max_model_len, cuts=False)
        prompts = [{"prompt_token_ids": sample.token_ids.tolist()} for sample in samples]

        def run_all(num_iters: int, title: str) -> np.ndarray:
            return np.array(
                [_seconds_of(llm, prompts, params) for _ in tqdm(range(num_iters), title, disable=args.disable_tqdm)]
            )

        run_all(args.num_iters_warmup, "Warmup iterations")
        latencies_s = run_all(args.num_iters, "Bench iterations")
    percentiles = dict(zip(_PERCENTILES, np.percentile(latencies_s, _PERCENTILES).tolist(), strict=True))
    print(f"Avg latency: {latencies_s.mean()} seconds")
    for percentage, value in percentiles.items():
        print(f"{percentage}% percentile latency: {value} seconds")
    if args.output_json:
        figures = {
            "avg_latency": float(latencies_s.mean()),
            "latencies": latencies_s.tolist(),
            "percentiles": percentiles,
        }
        write_json(args.output_json, figures)
    return 0


def _seconds_of(llm: Any, prompts: list[dict[str, Any]], params: SamplingParams) -> float:
    start_s = time.perf_counter()
    try:
        llm.generate(prompts, params, use_tqdm=False)
    except EngineError as error:
        raise BenchError(f"the engine failed: {error}") from None
    return time.perf_counter() - start_s
