"""Pictures of results: learning curves, and the sweep over the Morse kernel's lam.

uv run results/figures.py    draw those of results/runs.csv into results/figures/
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

if __name__ == "__main__":  # a script's own folder comes first; put the root there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from results import store, sweeps, tables
from results.store import Row
from results.tables import EMBEDDED, NAMES, Run

COLOURS = {  # Okabe and Ito's, told apart by colour-blind readers too
    "BC": "#E69F00",
    "10%BC": "#F0E442",
    "TD3+BC": "#56B4E9",
    "TD3-BST": "#0072B2",
    "IQL": "#CC79A7",
    "IQL-BST": "#D55E00",
}
DATA = "#6E6E6E"
SCALES = ("#FDB32F", "#E16462", "#9C179E", "#2A0593")  # small to large lam
PANEL = (3.6, 3.0)  # inches


def learning_curves(
    path: Path,
    rows: Sequence[Row],
    value: str = "score",
    updates_on: Callable[[str], int] | None = None,
) -> None:
    """Draws every method's mean ± sd over seeds against updates, a panel per dataset.

    Args:
        path: of the PNG.
        rows: of results, all evaluations; runs that are no plain method are left out.
        value: the column; in a PointMaze, where the score is soon 100, a score gives
            way to the steps to the goal.
        updates_on: a dataset's number of updates; if not given, its runs' largest.
    """
    runs = [run for run in tables.runs_of(rows) if tables.is_plain(run)]
    panels = {}
    for dataset in sorted({run.dataset for run in runs if run.method != "data"}):
        own = [run for run in runs if run.dataset == dataset]
        updates = updates_on(dataset) if updates_on else tables.largest_step(own)
        by_method = {
            method: tables.chosen(own, method, dataset, updates)
            for method in tables.METHODS
        }
        if any(len(run.rows) > 1 for method in COLOURS for run in by_method[method]):
            panels[dataset] = by_method  # a single evaluation is no curve
    width = 2 if len(panels) in (2, 4) else min(3, max(1, len(panels)))
    figure, axes = _figure(-(-len(panels) // width), width)
    for (dataset, by_method), ax in zip(panels.items(), axes.flat, strict=False):
        column = _column(dataset, value)
        for method, colour in COLOURS.items():
            _curve(ax, by_method[method], column, colour, method)
        _dashed(ax, by_method["data"], column)
        _name(ax, dataset, column)
        _against_updates(ax)
        _legend(ax)
    _finish(figure, axes, len(panels), path)


def ablation(path: Path, rows: Sequence[Row], value: str = "score") -> None:
    """Draws the sweep over lam: last evaluation above, learning curves below.

    Args:
        path: of the PNG.
        rows: of results, all evaluations; only TD3-BST's runs with `--scale` and the
            data's own values are drawn.
        value: the column, as in `learning_curves`.
    """
    runs = tables.runs_of(rows)
    panels = tables.by_scale(runs)
    figure, axes = _figure(2, max(1, len(panels)))
    for (dataset, by_lam), (above, below) in zip(panels.items(), axes.T, strict=False):
        column = _column(dataset, value)
        data = tables.chosen(runs, "data", dataset, 0)
        labels = {lam: tables.lam_label(lam, dataset) for lam in by_lam}
        colours = _colours(by_lam)
        _against_lam(above, by_lam, labels, colours, column)
        for lam, own in by_lam.items():
            _curve(below, own, column, colours[lam], labels[lam])
        for ax in (above, below):
            _dashed(ax, data, column)
            _name(ax, dataset if ax is above else "", column)
        _against_updates(below)
        _legend(below)
    _finish(figure, axes, axes.size if panels else 0, path)


def factors(path: Path, rows: Sequence[Row], step: int | None = None) -> None:
    """Draws TD3-BST's last evaluations with options changed, a panel per dataset.

    Args:
        path: of the PNG.
        rows: of results; TD3-BST's after `step` updates are drawn, and the means of
            TD3+BC and behaviour cloning as lines.
        step: the runs' number of updates; if not given, the largest.
    """
    runs = tables.runs_of(rows)
    step = step or max((run.step for run in runs), default=0)
    panels = tables.by_variant(runs, step)
    labels = list(dict.fromkeys(label for own in panels.values() for label in own))
    height = 0.9 + 0.26 * max(8, len(labels))
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    width = 2.6 + PANEL[0] * max(1, len(panels))
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(1, len(panels)), squeeze=False, sharey=True)
    for (dataset, own), ax in zip(panels.items(), axes.flat, strict=False):
        column = tables.figure_column(dataset)
        for label, found in own.items():
            _dots(ax, labels.index(label), tables.values(found, column), label)
        for method in ("BC", "TD3+BC"):
            sample = tables.values(tables.chosen(runs, method, dataset, step), column)
            if len(sample):
                style = {"color": COLOURS[method], "lw": 1.2, "zorder": 1}
                ax.axvline(sample.mean(), label=method, **style)
        _dashed_upright(ax, tables.chosen(runs, "data", dataset, 0), column)
        _name(ax, dataset, column)
        ax.set_xlabel(NAMES[column], fontsize=8)
        ax.set_ylabel("")
        ax.set_yticks(range(len(labels)), [x.replace("+", " ") for x in labels])
        ax.set_ylim(len(labels) - 0.5, -0.5)
        _legend(ax, 0.5 / height)
    _finish(figure, axes, len(panels), path)


def _dots(ax: Axes, place: int, sample: np.ndarray, label: str) -> None:
    """A dot per seed and a bar at their mean, on a line of their own."""
    if not len(sample):
        return
    colour = COLOURS["TD3-BST"] if label == sweeps.PLAIN else "#444444"
    ax.scatter(sample, [place] * len(sample), s=22, color=colour, alpha=0.6, lw=0)
    ax.plot([sample.mean()] * 2, [place - 0.32, place + 0.32], color=colour, lw=2.4)


def _dashed_upright(ax: Axes, data: Sequence[Run], column: str) -> None:
    for mean in tables.values(data, column):
        ax.axvline(mean, color=DATA, ls="--", lw=1, zorder=1, label="data")


def _figure(height: int, width: int) -> tuple[Figure, np.ndarray]:
    height = max(1, height)
    factor = 1.35 if width == height == 1 else 1.0
    size = factor * PANEL[0] * width, factor * PANEL[1] * height
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=size, layout=layout)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(height, width, squeeze=False)


def _finish(figure: Figure, axes: np.ndarray, used: int, path: Path) -> None:
    for ax in axes.flat[used:]:
        ax.set_axis_off()
    if not used:
        axes.flat[0].text(0.5, 0.5, "no such runs yet", ha="center", va="center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})  # same rows, same bytes


def _column(dataset: str, value: str) -> str:
    return tables.figure_column(dataset) if value == "score" else value


def _colours(lams: Mapping[float, Any]) -> dict[float, Any]:
    """SCALES, spread or interpolated over the lams."""
    shades = LinearSegmentedColormap.from_list("lam", SCALES)
    places = np.linspace(0, 1, len(lams))
    return {lam: shades(place) for lam, place in zip(lams, places, strict=True)}


def _evaluations(runs: Sequence[Run], column: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (T,) and values (T, n) of the n runs with any; NaN where one is missing."""
    every = sorted({int(row["step"]) for run in runs for row in run.rows})
    table = np.full((len(every), len(runs)), np.nan)
    for i, run in enumerate(runs):
        for row in run.rows:
            table[every.index(int(row["step"])), i] = float(row[column] or "nan")
    return np.array(every), table[:, ~np.isnan(table).all(axis=0)]


def _curve(ax: Axes, runs: Sequence[Run], column: str, colour: Any, label: str) -> None:
    """Mean ± sample sd against updates, where all seeds have a value."""
    if not runs:
        return
    steps, table = _evaluations(runs, column)
    whole = ~np.isnan(table).any(axis=1)
    steps, table = steps[whole], table[whole]
    if not table.size:
        return
    n, mean = table.shape[1], table.mean(axis=1)
    marker = "o" if len(steps) < 12 else ""
    first = label == "TD3-BST"  # in front, and thicker
    line = {"lw": 2.4 if first else 1.5, "zorder": 3 if first else 2}
    name = f"{label} (n = {n})"
    ax.plot(steps, mean, color=colour, marker=marker, ms=3, label=name, **line)
    if n > 1:
        sd = table.std(axis=1, ddof=1)
        ax.fill_between(steps, mean - sd, mean + sd, color=colour, alpha=0.15, lw=0)


def _against_lam(
    ax: Axes,
    by_lam: Mapping[float, Sequence[Run]],
    labels: Mapping[float, str],
    colours: Mapping[float, Any],
    column: str,
) -> None:
    """The last evaluations: a dot per seed, and the line of mean ± sample sd."""
    found = {lam: tables.values(own, column) for lam, own in by_lam.items()}
    found = {lam: sample for lam, sample in found.items() if len(sample)}
    means = [sample.mean() for sample in found.values()]
    sds = [s.std(ddof=1) if len(s) > 1 else 0.0 for s in found.values()]
    if found:
        line = {"color": "black", "lw": 1.2, "capsize": 3, "marker": "D", "ms": 4}
        ax.errorbar(list(found), means, sds, zorder=2, **line)
    for lam, sample in found.items():
        shown = {"color": colours[lam], "edgecolors": "white", "lw": 0.5, "zorder": 3}
        ax.scatter([lam * 0.92] * len(sample), sample, s=28, **shown)  # left of the bar
    ax.set_xscale("log")
    ax.set_xticks(list(by_lam), [labels[lam].replace(" = ", "\n") for lam in by_lam])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.margins(x=0.12)
    ax.set_xlabel("lam; dots: seeds, last evaluation", fontsize=8)


def _dashed(ax: Axes, data: Sequence[Run], column: str) -> None:
    for mean in tables.values(data, column):
        ax.axhline(mean, color=DATA, ls="--", lw=1, zorder=1, label="data")


def _name(ax: Axes, dataset: str, column: str) -> None:
    title = "embedded maze" if dataset == EMBEDDED else dataset.replace("+", "\n+ ")
    ax.set_title(title, fontsize=9)
    ax.set_ylabel(NAMES.get(column, column), fontsize=8)
    ax.tick_params(labelsize=8)
    ax.grid(axis="y", color="#E6E6E6", lw=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _against_updates(ax: Axes) -> None:
    ax.set_xlabel("updates", fontsize=8)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(_count))


def _count(value: float, _: int | None = None) -> str:
    """20000 as 20k, 1000000 as 1M."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _legend(ax: Axes, below: float = 0.2) -> None:
    """Below the panel, by a share of its height, so that it covers no curve."""
    if ax.get_legend_handles_labels()[0]:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -below)}
        ax.legend(**place, ncols=2, fontsize=7, frameon=False, columnspacing=1.2)


def main(root: Path = store.ROOT) -> None:
    """Draws the pages' figures."""
    rows = store.read(root / "results" / "runs.csv")
    folder = root / "results" / "figures"
    quick = [row for row in rows if row["dataset"] == EMBEDDED]
    updates = sweeps.TABLES["quick"].num_updates
    learning_curves(folder / "quick.png", quick, updates_on=lambda _: updates)
    learning_curves(folder / "standins.png", rows, updates_on=tables.updates_on)
    ablation(folder / "ablation-scale.png", rows)
    updates = sweeps.TABLES["bst-factors"].num_updates
    factors(folder / "bst-factors.png", tables.factor_rows(rows), updates)


if __name__ == "__main__":
    main()
