"""What a run prints: the lines of vLLM's benchmark, word for word, then how far the client itself can be trusted."""

import math
from collections.abc import Sequence

from manta.cluster.bench.metrics import METRICS, Summary

_WIDTH = 50
_LATE_MS = 50.0  # a request sent later than this changes the load that was asked for
_BUSY_SHARE = 0.5  # of a core: a busier client reads its answers late


def result_lines(
    summary: Summary, metrics: Sequence[str], request_rate: float, max_concurrency: int | None
) -> list[str]:
    """The block between the two rulers. `request_rate` inf: none was asked for."""
    lines = [_ruler(" Serving Benchmark Result ", "="), _line("Successful requests:", summary.completed)]
    lines.append(_line("Failed requests:", summary.failed))
    if summary.unfinished:
        lines.append(_line("Unfinished requests:", summary.unfinished))
    if max_concurrency is not None:
        lines.append(_line("Maximum request concurrency:", max_concurrency))
    if not math.isinf(request_rate):
        lines.append(_line("Request rate configured (RPS):", request_rate))
    lines.append(_line("Benchmark duration (s):", summary.duration_s))
    lines.append(_line("Total input tokens:", summary.total_input))
    lines.append(_line("Total generated tokens:", summary.total_output))
    lines.append(_line("Request throughput (req/s):", summary.request_throughput))
    if summary.request_goodput is not None:
        lines.append(_line("Request goodput (req/s):", summary.request_goodput))
    lines.append(_line("Output token throughput (tok/s):", summary.output_throughput))
    lines.append(_line("Peak output token throughput (tok/s):", summary.max_output_tokens_per_s))
    lines.append(_line("Peak concurrent requests:", float(summary.max_concurrent_requests)))
    lines.append(_line("Total token throughput (tok/s):", summary.total_token_throughput))
    for name in METRICS:
        if name in metrics:
            lines += _metric_lines(summary, name)
    lines += _client_lines(summary, max_concurrency)
    lines.append("=" * _WIDTH)
    return lines


def warnings(summary: Summary, paces: bool) -> list[str]:
    """What to know before the figures are believed. `paces`: requests had times to be sent at."""
    found = []
    if paces and summary.max_send_delay_ms > _LATE_MS:
        found.append(
            f"a request was sent {summary.max_send_delay_ms:.0f} ms late: the load was not what was asked for; "
            "give the client a core of its own"
        )
    if summary.client_cpu_share > _BUSY_SHARE:
        found.append(
            f"the client used {summary.client_cpu_share:.0%} of a core: it may have read answers late; "
            "use several clients at lower rates"
        )
    if summary.num_without_usage:
        found.append(
            f"{summary.num_without_usage} answers had no usage: their output tokens are counted as one per chunk"
        )
    return found


def _metric_lines(summary: Summary, name: str) -> list[str]:
    short, title = METRICS[name]
    stat = summary.stats[name]
    lines = [_ruler(title, "-"), _line(f"Mean {short} (ms):", stat.mean), _line(f"Median {short} (ms):", stat.median)]
    return lines + [_line(f"P{percentile:g} {short} (ms):", value) for percentile, value in stat.percentiles.items()]


def _client_lines(summary: Summary, max_concurrency: int | None) -> list[str]:
    lines = [_ruler("Load generator", "-")]
    if summary.total_cached is not None:
        lines.append(_line("Input tokens from the prefix cache (%):", share(summary.total_cached, summary.total_input)))
    lines.append(_line("Output tokens per chunk:", summary.tokens_per_chunk))
    lines.append(_line("Max send delay (ms):", summary.max_send_delay_ms))
    if max_concurrency is not None:
        lines.append(_line("Max wait for concurrency (s):", summary.max_queue_s))
    lines.append(_line("Client CPU (% of one core):", summary.client_cpu_share * 100))
    lines.append(_line("Client CPU per chunk (us):", summary.client_cpu_us_per_chunk))
    return lines


def share(part: int, whole: int) -> float:
    """Per cent; 0 of nothing is 0."""
    return 100 * part / whole if whole else 0.0


def _ruler(title: str, character: str) -> str:
    return f"{title:{character}^{_WIDTH}}"


def _line(label: str, value: float) -> str:
    return f"{label:<40} {value:<10.2f}" if isinstance(value, float) else f"{label:<40} {value:<10}"
