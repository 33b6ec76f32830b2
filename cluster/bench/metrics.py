"""Figures of a run, with vLLM's definitions.

TTFT: from sending to the first chunk with output. TPOT: the rest of the time to the end over output tokens - 1;
requests of a single token have none. ITL: every gap between two chunks with output, however many tokens they hold.
E2EL: from sending to the end. Percentiles interpolate linearly. Only successful requests count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from manta.cluster.bench.answers import Record
from manta.cluster.bench.load import Run

METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
GOODPUT_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class Stat:
    """Of one metric, in ms."""

    mean: float
    median: float
    std: float
    percentiles: dict[float, float]


@dataclass(frozen=True)
class Summary:
    """Everything that is printed of a run. Rates are per second of its whole duration."""

    completed: int
    failed: int
    unfinished: int  # under way, or not sent yet, when the run was interrupted
    duration_s: float
    total_input: int
    total_output: int
    total_cached: int | None  # prompt tokens from the prefix cache, where the server tells
    request_throughput: float
    request_goodput: float | None
    output_throughput: float
    total_token_throughput: float
    max_output_tokens_per_s: float
    max_concurrent_requests: int
    stats: dict[str, Stat]
    max_send_delay_ms: float
    max_queue_s: float
    client_cpu_share: float  # of one core
    client_cpu_us_per_chunk: float
    tokens_per_chunk: float
    num_without_usage: int


def summarize(
    run: Run, num_requests: int, percentiles: Sequence[float], goodput_ms: Mapping[str, float] | None = None
) -> Summary:
    """`goodput_ms`: metric of GOODPUT_METRICS -> its limit; a request is good when it keeps them all."""
    good = [record for record in run.records if record.is_success]
    failed = sum(bool(record.error) for record in run.records)
    total_input = sum(record.prompt_len for record in good)
    total_output = sum(record.output_len for record in good)
    num_chunks = sum(len(record.chunk_times_s) for record in good)
    all_chunks = sum(len(record.chunk_times_s) for record in run.records)
    cached = [record.num_cached_tokens for record in good if record.num_cached_tokens is not None]
    duration_s = run.duration_s
    return Summary(
        completed=len(good),
        failed=failed,
        unfinished=num_requests - len(good) - failed,
        duration_s=duration_s,
        total_input=total_input,
        total_output=total_output,
        total_cached=sum(cached) if cached else None,
        request_throughput=len(good) / duration_s,
        request_goodput=sum(_is_good(record, goodput_ms) for record in good) / duration_s if goodput_ms else None,
        output_throughput=total_output / duration_s,
        total_token_throughput=(total_input + total_output) / duration_s,
        max_output_tokens_per_s=max(tokens_per_bin(good, run.start_s, 1.0), default=0.0),
        max_concurrent_requests=max((count for _, count in concurrency(good)), default=0),
        stats={name: _stat(values, percentiles) for name, values in values_ms(good).items()},
        max_send_delay_ms=max(((record.start_s - record.due_s) * 1e3 for record in run.records), default=0.0),
        max_queue_s=max((record.queue_s for record in run.records), default=0.0),
        client_cpu_share=run.client_cpu_s / duration_s,
        client_cpu_us_per_chunk=run.client_cpu_s / max(1, all_chunks) * 1e6,
        tokens_per_chunk=total_output / num_chunks if num_chunks else 0.0,
        num_without_usage=sum(not record.has_usage for record in good),
    )


def values_ms(good: Sequence[Record]) -> dict[str, list[float]]:
    """Metric -> its values over successful requests (ITL: over all their gaps)."""
    return {
        "ttft": [record.ttft_s * 1e3 for record in good],
        "tpot": [tpot * 1e3 for record in good if (tpot := record.tpot_s) is not None],
        "itl": [gap for record in good for gap in (np.diff(record.chunk_times_s) * 1e3).tolist()],
        "e2el": [record.latency_s * 1e3 for record in good],
    }


def tokens_per_bin(good: Sequence[Record], start_s: float, bin_s: float) -> list[float]:
    """Output tokens per second in each bin from `start_s` on; a request's tokens are spread evenly over its chunks."""
    if not good:
        return []
    times = np.concatenate([np.array(record.chunk_times_s) for record in good]) - start_s
    weights = np.repeat(
        [record.output_len / max(1, len(record.chunk_times_s)) for record in good],
        [len(record.chunk_times_s) for record in good],
    )
    counts = np.bincount((times / bin_s).astype(np.int64), weights)
    return [float(count) / bin_s for count in counts]


def concurrency(good: Sequence[Record]) -> list[tuple[float, int]]:
    """(time, requests under way from then on), ascending; a request that ends at t no longer counts at t."""
    changes = [(record.start_s, 1) for record in good] + [(record.end_s or 0.0, -1) for record in good]
    result = []
    count = 0
    for time_s, change in sorted(changes):
        count += change
        result.append((time_s, count))
    return result


def _is_good(record: Record, limits_ms: Mapping[str, float]) -> bool:
    values_s = {"ttft": record.ttft_s, "tpot": record.tpot_s or 0.0, "e2el": record.latency_s}
    return all(values_s[name] * 1e3 <= limit for name, limit in limits_ms.items())


def _stat(values: list[float], percentiles: Sequence[float]) -> Stat:
    array = np.array(values or [0.0])
    return Stat(
        float(array.mean()),
        float(np.median(array)),
        float(array.std()),
        {percentile: float(np.percentile(array, percentile)) for percentile in percentiles},
    )
