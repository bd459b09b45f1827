"""Plots of a run as PNG, light and dark, by matplotlib without display or global state."""

import io
import itertools
import math
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_ppo.loop.run_folder import Sample
from rlhf_ppo.report.figures import FIGURES, FRONTIER_READING, FRONTIER_TITLE, HISTOGRAM_READING, HISTOGRAM_TITLE, Panel
from rlhf_ppo.report.run_data import RunData
from rlhf_ppo.report.summary import span
from rlhf_ppo.report.wording import format_number, metric_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

SMOOTHED_FROM = 40
"""Number of iterations from which a moving average is plotted over the curve."""
MAX_HISTOGRAMS = 4
HEIGHT = 4.7
"""Height in inches of a plot 7.2 inches wide."""

_DRAWING = threading.Lock()
"""matplotlib's style is global: a live page and a report must not draw at the same time."""


@dataclass(frozen=True)
class Palette:
    """Colors of the light or dark version, for plots and page."""

    ink: str
    faint: str
    grid: str
    paper: str
    first: str
    second: str
    colormap: str


LIGHT = Palette("#1c2430", "#5d6778", "#e4e8ee", "#ffffff", "#2f62c8", "#d9622b", "viridis")
DARK = Palette("#e6eaf1", "#9aa5b5", "#2d3542", "#171c24", "#7aa5f7", "#f0955c", "viridis")


@dataclass(frozen=True)
class Plot:
    """A plot as PNG in both versions."""

    name: str
    title: str
    reading: str
    alt: str
    """What the plot shows, for those who do not see it."""
    light: bytes
    dark: bytes

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, as the PNG says."""
        width, height = struct.unpack(">II", self.light[16:24])
        return width, height


Painter = Callable[["Canvas", Palette], None]


def draw_plots(data: RunData) -> tuple[list[Plot], list[str]]:
    """Draw all plots that the run has data for, with matplotlib; also return the titles of the others."""
    rows = data.metrics
    specifications: list[tuple[str, str, str, str, Painter | None, float]] = []
    for figure in FIGURES:
        panels = [panel for panel in figure.panels if _available_metric(panel, rows)]
        painter = _curves(panels, rows) if panels else None
        alt = f"{figure.title}: {'; '.join(_ends(panel, data) for panel in panels)}"
        specifications.append((figure.name, figure.title, figure.reading, alt, painter, HEIGHT))
    frontier = _frontier(rows)
    specifications.append(("frontier", FRONTIER_TITLE, FRONTIER_READING, FRONTIER_TITLE, frontier, HEIGHT))
    pairs = _score_pairs(data.samples)
    painter, height = _histograms(pairs) if pairs else None, HEIGHT / 2 * max(2, len(pairs))
    specifications.append(("scores", HISTOGRAM_TITLE, HISTOGRAM_READING, HISTOGRAM_TITLE, painter, height))
    with _DRAWING:
        plots = [
            Plot(name, title, reading, alt, _png(painter, LIGHT, height), _png(painter, DARK, height))
            for name, title, reading, alt, painter, height in specifications
            if painter is not None
        ]
    return plots, [title for _, title, _, _, painter, _ in specifications if painter is None]


def _ends(panel: Panel, data: RunData) -> str:
    """The curve in words: its label, and its means over the first and the last tenth."""
    start, end = span(data, _available_metric(panel, data.metrics)) or (math.nan, math.nan)
    return f"{' '.join(panel.label.split())} from {format_number(start)} to {format_number(end)}"


def smoothed(values: Sequence[float], *, window: int) -> list[float]:
    """Centered moving average; the window is cut off at both ends."""
    half = window // 2
    sums = list(itertools.accumulate(values, initial=0.0))
    ranges = [(max(0, index - half), min(len(values), index + half + 1)) for index in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in ranges]


def _available_metric(panel: Panel, rows: Sequence[dict[str, float]]) -> str:
    """First metric of the panel with at least two finite values; "" if there is none."""
    for name in panel.metrics:
        if sum(math.isfinite(row.get(name, math.nan)) for row in rows) >= 2:
            return name
    return ""


def _series(rows: Sequence[dict[str, float]], *names: str) -> list[tuple[float, ...]]:
    """(iteration, value, ...) of the rows in which all these metrics are finite."""
    points = [(row["iteration"], *(row.get(name, math.nan) for name in names)) for row in rows]
    return [row for row in points if all(map(math.isfinite, row))]


def _curves(panels: Sequence[Panel], rows: Sequence[dict[str, float]]) -> Painter:
    def paint(canvas: "Canvas", palette: Palette) -> None:
        axes = canvas.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, panel, color in zip(axes, panels, (palette.first, palette.second), strict=False):
            _curve(axis, panel, rows, palette, color)
        axes[-1].set_xlabel("iteration")

    return paint


def _curve(axis: "Axes", panel: Panel, rows: Sequence[dict[str, float]], palette: Palette, color: str) -> None:
    metric = _available_metric(panel, rows)
    points = _series(rows, metric)
    x, y = [point[0] for point in points], [point[1] for point in points]
    banded = _series(rows, metric, panel.band) if panel.band else []
    if banded:
        low, high = [m - s for _, m, s in banded], [m + s for _, m, s in banded]
        axis.fill_between([point[0] for point in banded], low, high, color=color, alpha=0.14, linewidth=0)
    if panel.noisy and len(y) >= SMOOTHED_FROM:
        axis.plot(x, y, color=color, alpha=0.35, linewidth=0.9)
        axis.plot(x, smoothed(y, window=max(5, len(y) // 15)), color=color, linewidth=2.2)
    else:
        axis.plot(x, y, color=color, linewidth=2.0, marker="o" if len(y) < 16 else None, markersize=4)
    if panel.zero:
        axis.axhline(0.0, color=palette.faint, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axis.set_ylabel(panel.label)
    axis.margins(x=0.01)


def _frontier(rows: Sequence[dict[str, float]]) -> Painter | None:
    points = _series(rows, "objective/kl", "ppo/mean_scores")
    if len(points) < 2:
        return None

    def paint(canvas: "Canvas", palette: Palette) -> None:
        from matplotlib.patheffects import withStroke

        axis = canvas.subplots()
        iterations, kl, scores = ([point[index] for point in points] for index in range(3))
        window = max(5, len(points) // 15) if len(points) >= SMOOTHED_FROM else 1
        path = smoothed(kl, window=window), smoothed(scores, window=window)
        axis.plot(*path, color=palette.faint, linewidth=1.2, alpha=0.7, zorder=2)
        dots = axis.scatter(kl, scores, c=iterations, cmap=palette.colormap, s=20, zorder=3, linewidths=0)
        for index, text in ((0, "start"), (-1, "end")):
            point = (path[0][index], path[1][index])
            axis.plot(*point, "o", markersize=9, markerfacecolor="none", markeredgecolor=palette.second, zorder=4)
            label = axis.annotate(text, point, xytext=(0, -18), textcoords="offset points", ha="center", zorder=5)
            label.set(color=palette.second, fontweight="bold")
            label.set_path_effects([withStroke(linewidth=3, foreground=palette.paper)])
        bar = canvas.colorbar(dots, ax=axis, pad=0.02, aspect=28)
        bar.set_label("iteration")
        bar.outline.set_visible(False)
        axis.set_xlabel("KL to the reference (nats per response)")
        axis.set_ylabel("mean score")
        axis.margins(0.06, 0.12)

    return paint


def _score_pairs(samples: Sequence[Sample]) -> dict[str, tuple[list[float], list[float]]]:
    """Judge -> (finite scores before, after), for judges with at least two of each."""
    scores_by_judge: dict[str, tuple[list[float], list[float]]] = {}
    for sample in samples:
        for index, scores in enumerate((sample.before_scores, sample.after_scores)):
            for judge, score in scores.items():
                if math.isfinite(score):
                    scores_by_judge.setdefault(judge, ([], []))[index].append(score)
    plotted = {judge: pair for judge, pair in scores_by_judge.items() if min(map(len, pair)) >= 2}
    return dict(list(plotted.items())[:MAX_HISTOGRAMS])


def _histograms(pairs: dict[str, tuple[list[float], list[float]]]) -> Painter:
    def paint(canvas: "Canvas", palette: Palette) -> None:
        axes = canvas.subplots(len(pairs), 1, squeeze=False)[:, 0]
        for axis, (judge, pair) in zip(axes, pairs.items(), strict=True):
            edges = _edges([*pair[0], *pair[1]])
            for scores, color, period in zip(pair, (palette.faint, palette.first), ("before", "after"), strict=True):
                mean = sum(scores) / len(scores)
                weights = [100.0 / len(scores)] * len(scores)
                label = f"{period} (mean {mean:.2f})"
                axis.hist(scores, edges, weights=weights, color=color, alpha=0.45, label=label)
                axis.hist(scores, edges, weights=weights, color=color, histtype="step", linewidth=1.4)
                axis.axvline(mean, color=color, linewidth=1.4, linestyle=(0, (4, 3)))
            axis.set_xlabel(metric_label(judge))
            axis.set_ylabel("% of responses")
            axis.legend(loc="best")

    return paint


def _edges(values: Sequence[float], *, bins: int = 30) -> list[float]:
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return [low + (high - low) * index / bins for index in range(bins + 1)]


def _png(painter: Painter, palette: Palette, height: float) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(_style(palette)):
        canvas = Canvas(figsize=(7.2, height), dpi=150, layout="constrained")
        painter(canvas, palette)
        canvas.align_ylabels()
        target = io.BytesIO()
        canvas.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()


def _style(palette: Palette) -> Any:  # matplotlib types rcParams by a list of all their names
    return {
        "axes.axisbelow": True,
        "axes.edgecolor": palette.grid,
        "axes.facecolor": palette.paper,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.labelcolor": palette.faint,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.facecolor": palette.paper,
        "font.family": "DejaVu Sans",
        "font.size": 11,
        "grid.color": palette.grid,
        "legend.frameon": False,
        "legend.labelcolor": palette.ink,
        "savefig.facecolor": palette.paper,
        "text.color": palette.ink,
        "xtick.color": palette.faint,
        "ytick.color": palette.faint,
        "ytick.major.size": 0,
    }
