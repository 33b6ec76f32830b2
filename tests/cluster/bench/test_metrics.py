"""Figures of a small run, worked out by hand."""

import pytest

from manta.cluster.bench.answers import Record
from manta.cluster.bench.load import Run
from manta.cluster.bench.metrics import concurrency, summarize, tokens_per_bin, values_ms

# sent, chunks at, end, input and output tokens; times in seconds, the run begins at 100 and takes 4 s.
A = Record(10, 4, 100.0, 0.0, 100.0, 102.0, [100.5, 101.0, 102.0], 5, 4, True, "length", 200)
B = Record(20, 2, 100.5, 0.25, 101.0, 101.2, [101.2], 1, 16, True, "stop", 200)
C = Record(30, 3, 101.0, 0.0, 101.0, 103.5, [101.1, 102.1, 103.5], 3, None, False, "length", 200)
FAILED = Record(9, 9, 103.0, 0.0, 103.01, None, [103.1], status=500, error="HTTP 500: no")
UNFINISHED = Record(9, 9, 103.5, 0.0, 103.5, None, [103.6])
RUN = Run([A, B, C, FAILED, UNFINISHED], 100.0, 4.0, 0.08, True)


def test_values() -> None:
    values = values_ms([A, B, C])
    assert values["ttft"] == pytest.approx([500, 200, 100])
    assert values["tpot"] == pytest.approx([1500 / 4, 2400 / 2])  # a single token has none
    assert values["itl"] == pytest.approx([500, 1000, 1000, 1400])
    assert values["e2el"] == pytest.approx([2000, 200, 2500])


def test_summary() -> None:
    summary = summarize(RUN, 7, [50, 90], {"ttft": 201.0, "tpot": 1300.0})
    assert (summary.completed, summary.failed, summary.unfinished) == (3, 1, 3)
    assert (summary.total_input, summary.total_output, summary.total_cached) == (60, 9, 20)
    assert summary.request_throughput == pytest.approx(3 / 4)
    assert summary.request_goodput == pytest.approx(2 / 4)  # B has no TPOT, C keeps both, A's TTFT is too long
    assert summary.output_throughput == pytest.approx(9 / 4)
    assert summary.total_token_throughput == pytest.approx(69 / 4)
    assert summary.max_concurrent_requests == 3
    # From 101 to 102: A's second chunk of 5/3 tokens, B's single token, C's first of 1 token.
    assert summary.max_output_tokens_per_s == pytest.approx(5 / 3 + 1 + 1)
    ttft = summary.stats["ttft"]
    assert (ttft.mean, ttft.median) == pytest.approx((800 / 3, 200))
    assert ttft.percentiles[90] == pytest.approx(200 + 0.8 * 300)  # position 1.8 of 100, 200, 500
    assert ttft.std == pytest.approx((((500 - 800 / 3) ** 2 + (200 - 800 / 3) ** 2 + (100 - 800 / 3) ** 2) / 3) ** 0.5)
    assert summary.stats["itl"].percentiles[50] == pytest.approx(1000)
    assert summary.max_send_delay_ms == pytest.approx(500)  # B
    assert summary.max_queue_s == 0.25
    assert summary.client_cpu_share == pytest.approx(0.02)
    assert summary.client_cpu_us_per_chunk == pytest.approx(80_000 / 9)  # of all chunks that came
    assert summary.tokens_per_chunk == pytest.approx(9 / 7)
    assert summary.num_without_usage == 1


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"e2el": 2000.0}, 2),
        ({"ttft": 500.0}, 3),
        ({"ttft": 99.0}, 0),
        ({"tpot": 0.0}, 1),  # a single token keeps every limit of TPOT
        ({"tpot": 375.1, "e2el": 1000.0}, 1),
    ],
)
def test_goodput(limits: dict[str, float], good: int) -> None:
    assert summarize(RUN, 5, [99], limits).request_goodput == pytest.approx(good / 4)


def test_without_goodput_there_is_none() -> None:
    assert summarize(RUN, 5, [99]).request_goodput is None


def test_nothing_succeeded() -> None:
    summary = summarize(Run([FAILED], 100.0, 1.0, 0.0, False), 1, [99])
    assert (summary.completed, summary.failed, summary.total_cached) == (0, 1, None)
    assert summary.stats["ttft"].mean == summary.output_throughput == summary.max_output_tokens_per_s == 0
    assert summarize(Run([], 0.0, 1.0, 0.0, True), 4, [99]).unfinished == 4


def test_bins_and_concurrency() -> None:
    bins = tokens_per_bin([A, B, C], 100.0, 0.5)
    assert bins == pytest.approx([0, 2 * 5 / 3, 2 * (5 / 3 + 2), 0, 2 * (5 / 3 + 1), 0, 0, 2 * 1])
    assert concurrency([A, B, C]) == [(100.0, 1), (101.0, 2), (101.0, 3), (101.2, 2), (102.0, 1), (103.5, 0)]
    # A request that starts when another one ends takes its place.
    after = Record(1, 1, start_s=102.0, end_s=103.0)
    assert max(count for _, count in concurrency([A, after])) == 1
