"""`manta bench throughput`: tokens per second of many requests at once on the engine in this process."""

import argparse
import time

from manta.cluster.bench.dataset_flags import LENGTH, add_dataset_flags, add_flag, check_dataset_flags, make_samples
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
from manta.cluster.bench.samples import Sample, fit_to_model, warm_up_samples
from manta.cluster.cli.flags import Parser
from manta.cluster.engine.outputs import RequestOutput
from manta.cluster.engine.types import EngineError
from manta.cluster.llm import LLM
from manta.cluster.offline_prompts import Prompt


def throughput_parser() -> argparse.ArgumentParser:
    """The parser; its errors are UsageErrors of one sentence."""
    parser = Parser(
        prog="manta bench throughput",
        usage="manta bench throughput --model MODEL [flags]",
        description="Measure how many tokens per second the engine computes, without a server.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("Benchmark")
    add_flag(group, "--num-warmups", "requests of other tokens before the measured ones", 0, type=LENGTH, metavar="N")
    add_run_flags(group)
    add_dataset_flags(parser)
    add_engine_flags(parser)
    return parser


def bench_throughput(args: argparse.Namespace) -> int:
    """Runs the benchmark; returns 0. Raises BenchError or UsageError."""
    check_dataset_flags(args)
    check_json(args.output_json)
    settings = engine_settings(args)
    sampling_of(args, 1)  # whatever is wrong with it should not wait for the engine
    model = model_prompts(settings)
    cuts = args.dataset_name == "trace"
    samples = fit_to_model(make_samples(args, model.ids, model.tokenizer), model.max_model_len, cuts)
    with open_engine(settings, not args.disable_detokenize) as llm:
        samples = fit_to_model(samples, llm.max_model_len, cuts)
        _generate(llm, warm_up_samples(samples, model.ids, args.num_warmups, args.seed), args)
        outputs, elapsed_s = _generate(llm, samples, args)
    _report(outputs, elapsed_s, args.output_json)
    return 0


def _generate(llm: LLM, samples: list[Sample], args: argparse.Namespace) -> tuple[list[RequestOutput], float]:
    """The outputs, and seconds from giving all samples to the engine until the last is finished. Raises BenchError."""
    prompts: list[Prompt] = [{"prompt_token_ids": sample.token_ids.tolist()} for sample in samples]
    params = [sampling_of(args, sample.output_len) for sample in samples]
    start_s = time.perf_counter()
    try:
        outputs = llm.generate(prompts, params, use_tqdm=not args.disable_tqdm)
    except EngineError as error:
        raise BenchError(f"the engine failed: {error}") from None
    return outputs, time.perf_counter() - start_s


def _report(outputs: list[RequestOutput], elapsed_s: float, output_json: str | None) -> None:
    num_input = sum(len(output.prompt_token_ids) for output in outputs)
    num_output = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    total = num_input + num_output
    print(
        f"Throughput: {len(outputs) / elapsed_s:.2f} requests/s, {total / elapsed_s:.2f} total tokens/s, "
        f"{num_output / elapsed_s:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens:  {num_input}")
    print(f"Total num output tokens:  {num_output}")
    if output_json:
        figures = {
            "elapsed_time": elapsed_s,
            "num_requests": len(outputs),
            "total_num_tokens": total,
            "total_output_tokens": num_output,
            "num_cached_tokens": sum(output.num_cached_tokens for output in outputs),
            "requests_per_second": len(outputs) / elapsed_s,
            "tokens_per_second": total / elapsed_s,
            "output_tokens_per_second": num_output / elapsed_s,
        }
        write_json(output_json, figures)
