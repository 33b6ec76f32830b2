"""A picture of a comparison: one panel per figure, medians as bars, lowest to highest round as lines."""

from collections.abc import Sequence
from pathlib import Path

from measure import FIGURES
from summary import Summary


def plot(path: Path, summary: Summary, engines: Sequence[str], title: str) -> None:
    """Writes a picture in the format of the file's ending. Needs matplotlib: `pip install 'manta[bench]'`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [figure for figure in FIGURES if summary.get(figure.key)]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    height = 1.1 + 0.32 * len(engines)
    canvas, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, height * rows), squeeze=False)
    colors = [pyplot.get_cmap("tab10")(index % 10) for index in range(len(engines))]
    for index, axis in enumerate(axes.flat):
        if index >= len(shown):
            axis.axis("off")
            continue
        figure = shown[index]
        for position, engine in enumerate(engines):
            spread = summary[figure.key].get(engine)
            if spread is None:
                continue
            errors = [[spread.median - spread.low], [spread.high - spread.median]]
            axis.barh(position, spread.median, color=colors[position], xerr=errors, error_kw={"lw": 1})
        axis.set_yticks(range(len(engines)), engines if index % columns == 0 else [""] * len(engines), fontsize=8)
        axis.invert_yaxis()
        better = "more is better" if figure.higher_is_better else "less is better"
        axis.set_title(f"{figure.workload}: {figure.name}, {figure.unit} ({better})", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    canvas.suptitle(title, fontsize=10)
    canvas.tight_layout()
    canvas.savefig(path, dpi=150)
    pyplot.close(canvas)
