"""The report's charts as PNG files, for papers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vdr_cli.report.charts import Chart, finite
from vdr_cli.report.intervals import IntervalChart, ordered
from vdr_cli.system.text import visible

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#777777")
"""Okabe and Ito's, which stay apart for colour-blind readers."""
DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)))


def write_png(chart: Chart, folder: Path) -> Path:
    """folder/<title>.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, one in enumerate(map(finite, chart.series)):
        colour, dash = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
        name = _plain(one.name)
        if not one.x:
            continue
        if chart.is_scatter:
            axes.scatter(one.x, one.y, s=6, color=colour, alpha=0.6, label=name, linewidths=0)
            continue
        axes.plot(one.x, one.y, color=colour, linestyle=dash, linewidth=1.2, label=name)
        if one.low is not None and one.high is not None:
            axes.fill_between(one.x, one.low, one.high, color=colour, alpha=0.18, linewidth=0)
    axes.set_xlabel(_plain(chart.x_label))
    axes.set_ylabel(_plain(chart.y_label))
    axes.set_title(_plain(chart.title), fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    if len(chart.series) > 1:
        axes.legend(frameon=False, fontsize="small")
    return _saved(figure, chart.title, folder)


def write_intervals_png(chart: IntervalChart, folder: Path) -> Path:
    """folder/<title>.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = ordered(chart)[::-1]
    figure = Figure(figsize=(4.2, 0.8 + 0.2 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axvline(chart.chance, color="#777777", linestyle=":", linewidth=0.8)
    for at, row in enumerate(rows):
        colour = COLOURS[int(row.is_baseline)]
        axes.plot([row.low, row.high], [at, at], color=colour, linewidth=1.5)
        axes.plot([row.value], [at], "o", color=colour, markersize=3.5)
    axes.set_yticks(range(len(rows)), [_plain(row.name) for row in rows], fontsize="x-small")
    axes.set_xlabel(_plain(chart.x_label))
    axes.set_title(_plain(chart.title), fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    return _saved(figure, chart.title, folder)


def _saved(figure: Any, title: str, folder: Path) -> Path:
    path = folder / (re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_") + ".png")
    figure.savefig(path, dpi=300)
    return path


def _plain(text: str) -> str:
    """Safe to draw: a dollar sign would begin a formula."""
    return visible(text).replace("$", r"\$")
