"""Medians and spreads of the rounds, and the table of them with ratios."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from measure import FIGURES, MIB, Figure, Sample


@dataclass(frozen=True)
class Spread:
    """What the rounds of one figure gave."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values), len(values))


Summary = dict[str, dict[str, Spread]]  # figure key -> engine -> spread


def summarize(samples: Iterable[Sample], starts_s: dict[str, float]) -> Summary:
    """`starts_s` are the seconds each engine took from its start to its first token. Samples that other processes
    disturbed count where an engine has no others of that workload."""
    samples = list(samples)
    calm = {(sample.engine, sample.workload) for sample in samples if not sample.is_disturbed}
    values: dict[str, dict[str, list[float]]] = {}
    for sample in samples:
        if sample.is_disturbed and (sample.engine, sample.workload) in calm:
            continue
        for key, value in sample.figures.items():
            values.setdefault(key, {}).setdefault(sample.engine, []).append(value)
    for engine, start_s in starts_s.items():
        values.setdefault("start to first token", {})[engine] = [start_s]
    for engine in dict.fromkeys(sample.engine for sample in samples):
        highest = max(sample.pss_bytes for sample in samples if sample.engine == engine)
        values.setdefault("memory highest seen", {})[engine] = [highest / MIB]
    return {key: {engine: Spread.of(found) for engine, found in row.items()} for key, row in values.items()}


def table(summary: Summary, engines: Sequence[str]) -> str:
    """Markdown: a row per figure, a column per engine; `x1.50` means that the first engine is 1.5 times as good."""
    head = ["figure", *engines]
    lines = [_row(head), _row(["---"] * len(head))]
    for figure in FIGURES:
        row = summary.get(figure.key, {})
        if row:
            ours = row.get(engines[0])
            cells = [_cell(figure, row.get(engine), None if engine == engines[0] else ours) for engine in engines]
            lines.append(_row([f"{figure.workload}: {figure.name}, {figure.unit}", *cells]))
    return "\n".join(lines)


def _cell(figure: Figure, spread: Spread | None, ours: Spread | None) -> str:
    if spread is None:
        return "-"
    text = _number(spread.median)
    if spread.count > 1:
        text += f" ({_number(spread.low)}-{_number(spread.high)})"
    return text + (f", x{figure.ratio(ours.median, spread.median):.2f}" if ours else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
