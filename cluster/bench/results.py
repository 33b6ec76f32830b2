"""The figures of a run as a JSON file, with the keys of vLLM's benchmark."""

import argparse
import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from manta.cluster.bench.answers import Record
from manta.cluster.bench.errors import BenchError
from manta.cluster.bench.load import Run
from manta.cluster.bench.metrics import Summary


def result_path(args: argparse.Namespace, model: str, request_rate: float, now: datetime) -> Path:
    """Where the file goes; its folder is made. Raises BenchError."""
    limit = f"-concurrency{args.max_concurrency}" if args.max_concurrency else ""
    rate = _rate_name(args, request_rate)
    name = f"{args.label or args.backend}-{rate}qps{limit}-{Path(model).name}-{now:%Y%m%d-%H%M%S}.json"
    folder = Path(args.result_dir or ".").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"--result-dir {folder} cannot be made: {error.strerror}") from None
    return folder / (args.result_filename or name)


def result_values(
    args: argparse.Namespace, model: str, tokenizer: str | None, request_rate: float, now: datetime, summary: Summary
) -> dict[str, Any]:
    """Settings and figures; of the metrics those that --percentile-metrics names."""
    values: dict[str, Any] = {
        "date": f"{now:%Y%m%d-%H%M%S}",
        "endpoint_type": args.backend,
        "backend": args.backend,
        "label": args.label,
        "model_id": model,
        "tokenizer_id": tokenizer,
        "dataset_name": args.dataset_name,
        "num_prompts": summary.completed + summary.failed + summary.unfinished,
        "seed": args.seed,
        **dict(args.metadata),
        "request_rate": _rate_name(args, request_rate),
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        "duration": summary.duration_s,
        "completed": summary.completed,
        "failed": summary.failed,
        "unfinished": summary.unfinished,
        "total_input_tokens": summary.total_input,
        "total_output_tokens": summary.total_output,
        "total_cached_tokens": summary.total_cached,
        "request_throughput": summary.request_throughput,
        "request_goodput": summary.request_goodput,
        "output_throughput": summary.output_throughput,
        "total_token_throughput": summary.total_token_throughput,
        "max_output_tokens_per_s": summary.max_output_tokens_per_s,
        "max_concurrent_requests": summary.max_concurrent_requests,
    }
    for name in args.percentile_metrics:
        stat = summary.stats[name]
        values |= {f"mean_{name}_ms": stat.mean, f"median_{name}_ms": stat.median, f"std_{name}_ms": stat.std}
        values |= {f"p{percentile:g}_{name}_ms": value for percentile, value in stat.percentiles.items()}
    return values | {
        "output_tokens_per_chunk": summary.tokens_per_chunk,
        "max_send_delay_ms": summary.max_send_delay_ms,
        "max_queue_time_s": summary.max_queue_s,
        "client_cpu_share": summary.client_cpu_share,
        "client_cpu_us_per_chunk": summary.client_cpu_us_per_chunk,
    }


def detailed_values(run: Run) -> dict[str, Any]:
    """Lists with one entry per request, in the order of sending; times in seconds, starts from that of the run."""
    records = run.records

    def of_good(value: str) -> list[float]:
        return [getattr(record, value) if record.is_success else 0.0 for record in records]

    return {
        "input_lens": [record.prompt_len for record in records],
        "output_lens": [record.output_len if record.is_success else 0 for record in records],
        "start_times": [record.start_s - run.start_s for record in records],
        "queue_times": [record.queue_s for record in records],
        "ttfts": of_good("ttft_s"),
        "latencies": of_good("latency_s"),
        "itls": [np.diff(record.chunk_times_s).tolist() for record in records],
        "generated_texts": [record.text for record in records],
        "errors": [_error_of(record) for record in records],
    }


def write_result(path: Path, values: dict[str, Any], append: bool) -> None:
    """One JSON object, as the whole file or as one more line. Raises BenchError."""
    try:
        with path.open("a" if append else "w", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}") from None


def _rate_name(args: argparse.Namespace, request_rate: float) -> float | str:
    """A number, "inf", or "trace" for the times of a trace."""
    if not math.isinf(request_rate):
        return request_rate
    return "trace" if args.dataset_name == "trace" and args.request_rate is None else "inf"


def _error_of(record: Record) -> str:
    return record.error or ("" if record.is_success else "unfinished")
