"""Draws a run over time: TTFT of each request, inter-token latency, throughput and requests under way."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from manta.cluster.bench.answers import Record
from manta.cluster.bench.errors import BenchError
from manta.cluster.bench.load import Run
from manta.cluster.bench.metrics import concurrency, tokens_per_bin

SUFFIXES = (".png", ".svg", ".pdf")
_NUM_BINS = 80
_BIN_WIDTHS_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_BLUE, _ORANGE, _GREY, _RED = "#2166ac", "#e08214", "#7f7f7f", "#b2182b"


def check_plot(path: Path) -> None:
    """Raises BenchError for a plot that could not be written after the run."""
    if path.suffix not in SUFFIXES:
        raise BenchError(f"--plot {path} must end with one of {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise BenchError(f"--plot {path}: there is no folder {path.absolute().parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchError("--plot needs matplotlib: pip install 'manta[bench]'")


def draw(run: Run, title: str, path: Path) -> None:
    """Writes the figure; the suffix decides the format. Raises BenchError."""
    from matplotlib.figure import Figure

    good = [record for record in run.records if record.is_success]
    last_s = max((record.end_s or 0.0 for record in good), default=run.start_s) - run.start_s
    bin_s = next((width for width in _BIN_WIDTHS_S if last_s / width <= _NUM_BINS), _BIN_WIDTHS_S[-1])
    figure = Figure(figsize=(9, 8), layout="constrained")
    ttft, itl, throughput = figure.subplots(3, 1, sharex=True)
    figure.suptitle(title, fontsize=10)
    _draw_ttft(ttft, run, good)
    _draw_itl(itl, run, good, bin_s)
    _draw_throughput(throughput, run, good, bin_s)
    for axes in (ttft, itl, throughput):
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    throughput.set_xlabel("time since the first request was due (s)")
    throughput.set_xlim(0, max(last_s, bin_s))
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise BenchError(f"cannot write --plot {path}: {error.strerror}") from None


def _draw_ttft(axes: Any, run: Run, good: Sequence[Record]) -> None:
    starts = [record.start_s - run.start_s for record in good]
    ttfts = [record.ttft_s * 1e3 for record in good]
    axes.scatter(starts, ttfts, s=9, color=_BLUE, label="one request, where it was sent", linewidths=0)
    if ttfts:
        axes.axhline(float(np.median(ttfts)), color=_ORANGE, linewidth=1, label=f"median {np.median(ttfts):.0f} ms")
    failed = [record.start_s - run.start_s for record in run.records if record.error]
    if failed:
        axes.scatter(failed, [0.0] * len(failed), s=30, color=_RED, marker="x", label="failed", clip_on=False)
    axes.set_ylabel("TTFT (ms)")
    _legend(axes)


def _draw_itl(axes: Any, run: Run, good: Sequence[Record], bin_s: float) -> None:
    gaps = [np.diff(record.chunk_times_s) * 1e3 for record in good]
    ends = [np.array(record.chunk_times_s[1:]) - run.start_s for record in good]
    axes.set_ylabel("ITL (ms)")
    if not sum(map(len, gaps)):
        return
    values, bins = np.concatenate(gaps), (np.concatenate(ends) / bin_s).astype(int)
    parts = [values[bins == one] for one in range(bins.max() + 1)]
    centres = (np.arange(len(parts)) + 0.5) * bin_s
    for percentile, color in ((50, _BLUE), (99, _ORANGE)):
        line = [np.percentile(part, percentile) if len(part) else np.nan for part in parts]  # nan leaves a gap
        label = f"P{percentile} per {bin_s:g} s"
        axes.plot(centres, line, color=color, linewidth=1.2, marker=".", markersize=4, label=label)
    _legend(axes)


def _draw_throughput(axes: Any, run: Run, good: Sequence[Record], bin_s: float) -> None:
    rates = tokens_per_bin(good, run.start_s, bin_s)
    edges = np.arange(len(rates) + 1) * bin_s
    axes.stairs(rates, edges, color=_BLUE, fill=True, alpha=0.5, label=f"output tokens per {bin_s:g} s")
    axes.set_ylabel("output (tok/s)")
    changes = concurrency(good)
    right = axes.twinx()
    right.step(
        [time_s - run.start_s for time_s, _ in changes], [count for _, count in changes],
        where="post", color=_GREY, linewidth=1, label="requests under way",
    )  # fmt: skip
    right.set_ylabel("requests under way", color=_GREY)
    right.set_ylim(bottom=0)
    right.yaxis.get_major_locator().set_params(integer=True)
    _legend(axes, right.get_legend_handles_labels()[0])


def _legend(axes: Any, others: Sequence[Any] = ()) -> None:
    """Above the axes, where it hides nothing."""
    handles = [*axes.get_legend_handles_labels()[0], *others]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=8, frameon=False)
