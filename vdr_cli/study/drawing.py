"""A study's pictures of differences and of single runs, as inline SVG. Pure: numbers in, markup out.

Names stand above their rows, so that long ones fit and a phone can show them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from vdr_cli.report.charts import WIDTH, number, ticks
from vdr_cli.system.text import visible

ROW, LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 8, 48
LINE, JITTER = 36, 7
"""Height of the interval within its row, and the distance of the seeds' points from it."""
KINDS = {"better": "better", "worse": "worse", "equivalent": "same"}
"""First word of a verdict to its style; others are plain."""


@dataclass(frozen=True)
class RangeRow:
    """A number with its interval, and the seeds that it is the mean of."""

    name: str
    value: float
    low: float
    high: float
    points: Sequence[float]
    note: str = ""
    """At the right end of the row: the verdict."""


def ranges_svg(
    title: str, x_label: str, rows: Sequence[RangeRow], line: float | None = None, bound: float = 0.0
) -> str:
    """A row each, in the given order. line: where nothing differs, or the start; bound: half the width of the zone
    around it that does not matter."""
    shown = [row for row in rows if math.isfinite(row.value)]
    if not shown:
        return '<p class="nothing">Nothing was measured.</p>'
    low, high = _span(shown, line, bound)
    bottom = TOP + ROW * len(shown)

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    parts = [_zone(x, line, bound, bottom), *_axis(x, low, high, x_label, bottom)]
    if line is not None:
        parts.append(f'<line class="chance" x1="{x(line):.1f}" x2="{x(line):.1f}" y1="{TOP}" y2="{bottom}"/>')
    parts += [_row(row, TOP + ROW * index, x) for index, row in enumerate(shown)]
    label = escape(visible(f"{title}: {'; '.join(map(_told, shown))}"))
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {bottom + BOTTOM}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def _row(row: RangeRow, top: float, x: Callable[[float], float]) -> str:
    y = top + LINE
    style = KINDS.get(row.note.partition(",")[0], "plain")
    texts = f'<text class="name" x="{LEFT}" y="{top + 19}">{escape(visible(row.name))}</text>'
    if row.note:
        place = f'x="{WIDTH - RIGHT}" y="{top + 19}" text-anchor="end"'
        texts += f'<text class="note {style}" {place}>{escape(visible(row.note))}</text>'
    points = "".join(
        f'<circle cx="{x(value):.1f}" cy="{y + _offset(index):.1f}" r="2.6"/>'
        for index, value in enumerate(row.points)
        if math.isfinite(value)
    )
    interval = ""
    if math.isfinite(row.low) and math.isfinite(row.high):
        interval = f'<line class="range {style}" x1="{x(row.low):.1f}" x2="{x(row.high):.1f}" y1="{y}" y2="{y}"/>'
    middle = f'<circle class="mean {style}" cx="{x(row.value):.1f}" cy="{y}" r="5"/>'
    return f'{texts}<g class="seeds">{points}</g>{interval}{middle}'


def _offset(index: int) -> float:
    """Above and below in turn, so that seeds with equal numbers stay apart."""
    return JITTER * (1 if index % 2 else -1) * (0.6 + 0.4 * (index // 2 % 2))


def _zone(x: Callable[[float], float], line: float | None, bound: float, bottom: float) -> str:
    if line is None or bound <= 0:
        return ""
    left, right = x(line - bound), x(line + bound)
    return f'<rect class="zone" x="{left:.1f}" width="{right - left:.1f}" y="{TOP}" height="{bottom - TOP}"/>'


def _axis(x: Callable[[float], float], low: float, high: float, label: str, bottom: float) -> list[str]:
    parts = []
    for value in ticks(low, high):
        at = x(value)
        anchor = "end" if at > WIDTH - RIGHT - 20 else "start" if at < LEFT + 20 else "middle"
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}"/>')
        shown = number(value).replace("-", "\u2212")
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 18}" text-anchor="{anchor}">{shown}</text>')
    middle = f'x="{WIDTH / 2}" y="{bottom + 40}" text-anchor="middle"'
    return [*parts, f'<text class="label" {middle}>{escape(visible(label))}</text>']


def _span(rows: Sequence[RangeRow], line: float | None, bound: float) -> tuple[float, float]:
    """Range of the axis: every number, the line and its zone, with a margin."""
    edges = [value for row in rows for value in (row.value, row.low, row.high, *row.points) if math.isfinite(value)]
    if line is not None:
        edges += [line - bound, line + bound]
    margin = 0.04 * (max(edges) - min(edges)) or 0.1
    return min(edges) - margin, max(edges) + margin


def _told(row: RangeRow) -> str:
    interval = f", {number(row.low)} to {number(row.high)}" if math.isfinite(row.low) else ""
    return f"{row.name} {number(row.value)}{interval}{f', {row.note}' if row.note else ''}"
