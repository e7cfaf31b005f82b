"""Numbers with their intervals, a row each, as inline SVG: which measure ranks best, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from vdr_cli.report.charts import WIDTH, number, ticks
from vdr_cli.system.text import visible

ROW, NAMES, RIGHT, TOP, BOTTOM = 22, 130, 20, 8, 40


@dataclass(frozen=True)
class Interval:
    name: str
    value: float
    low: float
    high: float
    is_baseline: bool
    """Drawn in the second colour: what the others have to beat."""


@dataclass(frozen=True)
class IntervalChart:
    title: str
    x_label: str
    rows: Sequence[Interval]
    chance: float
    """The value that says nothing."""


def interval_svg(chart: IntervalChart) -> str:
    """A dot with its interval for each row, highest value first."""
    rows = ordered(chart)
    low, high = span(chart)
    bottom = TOP + ROW * len(rows)

    def x(value: float) -> float:
        return NAMES + (value - low) / (high - low) * (WIDTH - NAMES - RIGHT)

    parts = []
    for value in ticks(low, high):
        parts.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{x(value):.1f}" y="{bottom + 16}" text-anchor="middle">{number(value)}</text>'
        )
    at = x(chart.chance)
    parts.append(f'<line class="chance" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}"/>')
    for index, row in enumerate(rows):
        y, style = TOP + ROW * (index + 0.5), f"s{int(row.is_baseline)}"
        parts.append(
            f'<text class="tick" x="{NAMES - 8}" y="{y + 4}" text-anchor="end">{escape(visible(row.name))}</text>'
        )
        parts.append(f'<line class="range {style}" x1="{x(row.low):.1f}" x2="{x(row.high):.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<g class="solid {style}"><circle cx="{x(row.value):.1f}" cy="{y}" r="4.5"/></g>')
    middle = (NAMES + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{bottom + 34}" text-anchor="middle">{escape(chart.x_label)}</text>'
    )
    told = "; ".join(f"{row.name} {row.value:.3f}, {row.low:.3f} to {row.high:.3f}" for row in rows)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {bottom + BOTTOM}" role="img" '
        f'aria-label="{escape(visible(f"{chart.title}: {told}"))}">{"".join(parts)}</svg>'
    )


def ordered(chart: IntervalChart) -> list[Interval]:
    """Highest first; rows without a number left out."""
    kept = [row for row in chart.rows if all(map(math.isfinite, (row.value, row.low, row.high)))]
    return sorted(kept, key=lambda row: -row.value)


def span(chart: IntervalChart) -> tuple[float, float]:
    """The axis's range: every interval and chance, with a margin."""
    edges = [chart.chance, *(edge for row in ordered(chart) for edge in (row.low, row.high))]
    margin = 0.04 * (max(edges) - min(edges)) or 0.1
    return min(edges) - margin, max(edges) + margin
