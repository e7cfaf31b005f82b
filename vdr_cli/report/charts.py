"""Line charts, scatter plots and histograms as inline SVG. Pure: numbers in, markup out.

Colours are CSS classes (s0, s1, ...), so that the page decides about light and dark; every series also has its own
dash, so that it can be told apart without colour. Text is escaped here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape

from vdr_cli.system.text import visible

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 40
MAX_POINTS = 400
LARGEST = 1e300
"""Values beyond it are drawn at it: the difference of two of them would be infinite."""
LONGEST_NUMBER = 1e15
"""Numbers from here on are written with an exponent."""
SERIES_STYLES = 8
Points = Sequence[float]


@dataclass(frozen=True)
class Series:
    name: str
    x: Points
    y: Points
    low: Points | None = None
    """Lower edge of the band, as long as y; None: no band."""
    high: Points | None = None


@dataclass(frozen=True)
class Chart:
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series] = field(default_factory=tuple)
    is_scatter: bool = False
    is_log_x: bool = False
    """The x axis shows powers of two at equal distances."""
    y_range: tuple[float, float] | None = None
    """Lowest and highest y, for charts that are compared; None: from the data."""


@dataclass(frozen=True)
class _Frame:
    """From data to SVG coordinates."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def svg(chart: Chart) -> str:
    """The chart; a line of text when there is nothing to draw."""
    numbered = [(index, thinned(finite(one))) for index, one in enumerate(chart.series)]
    if chart.is_log_x:
        numbered = [(index, replace(one, x=[math.log2(value) for value in one.x])) for index, one in numbered]
    numbered = [(index, one) for index, one in numbered if len(one.x)]  # each keeps its colour in every chart of a page
    series = [one for _, one in numbered]
    if not series:
        return '<p class="nothing">Nothing was measured.</p>'
    frame = _frame(series, chart.is_scatter)
    if chart.y_range is not None:
        frame = replace(frame, y_low=chart.y_range[0], y_high=chart.y_range[1])
    label = escape(visible(f"{chart.title}: {_summary(series)}"))
    marks = [_marks(one, index, frame, chart.is_scatter) for index, one in numbered]
    data = escape(
        json.dumps([{"name": visible(one.name), "x": _rounded(one.x), "y": _rounded(one.y)} for one in series])
    )
    legend = _legend(numbered) if len(chart.series) > 1 else ""
    box = json.dumps([frame.x_low, frame.x_high, LEFT, WIDTH - RIGHT])
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" '
        f'data-series="{data}" data-box="{box}"{" data-log" if chart.is_log_x else ""}>'
        f"{_axes(frame, chart)}{''.join(marks)}"
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>{legend}'
    )


def finite(series: Series) -> Series:
    """The points whose coordinates are all numbers, none of them beyond LARGEST."""
    kept = [
        index
        for index, (x, y) in enumerate(zip(series.x, series.y, strict=True))
        if math.isfinite(x) and math.isfinite(y)
    ]

    def chosen(values: Points | None) -> list[float] | None:
        if values is None:
            return None
        return [_drawn(values[index] if math.isfinite(values[index]) else series.y[index]) for index in kept]

    return Series(
        series.name,
        [_drawn(series.x[index]) for index in kept],
        [_drawn(series.y[index]) for index in kept],
        chosen(series.low),
        chosen(series.high),
    )


def _drawn(value: float) -> float:
    return min(max(value, -LARGEST), LARGEST)


def thinned(series: Series) -> Series:
    """At most MAX_POINTS points, the means of equal stretches; their extremes become the band if there is none."""
    count = len(series.x)
    if count <= MAX_POINTS:
        return series
    edges = [index * count // MAX_POINTS for index in range(MAX_POINTS + 1)]
    spans = [slice(edges[index], edges[index + 1]) for index in range(MAX_POINTS)]

    def means(values: Points) -> list[float]:
        return [sum(values[span]) / len(values[span]) for span in spans]

    low = means(series.low) if series.low is not None else [min(series.y[span]) for span in spans]
    high = means(series.high) if series.high is not None else [max(series.y[span]) for span in spans]
    return Series(series.name, means(series.x), means(series.y), low, high)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between low and high, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Short: 0.25, 1,200, 3.1e-05."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1000 <= abs(value) < LONGEST_NUMBER:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _frame(series: Sequence[Series], is_scatter: bool) -> _Frame:
    xs = [value for one in series for value in one.x]
    ys = [value for one in series for part in (one.y, one.low, one.high) if part is not None for value in part]
    x_low, x_high = _spread(min(xs), max(xs))
    y_low, y_high = _spread(min(ys), max(ys))
    margin = 0.05 * (y_high - y_low)
    y_low = 0.0 if 0 <= y_low < 0.3 * y_high else y_low - margin
    if is_scatter:
        x_low, x_high = x_low - 0.03 * (x_high - x_low), x_high + 0.03 * (x_high - x_low)
        y_low = min(y_low, min(ys) - margin)
    return _Frame(x_low, x_high, y_low, y_high + margin)


def _spread(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    if high > low:
        return low, high
    half = abs(low) * 0.5 or 0.5
    return low - half, high + half


def _axes(frame: _Frame, chart: Chart) -> str:
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in ticks(frame.y_low, frame.y_high):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text("tick", f'x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end"', number(value)))
    for value in _log_ticks(frame) if chart.is_log_x else ticks(frame.x_low, frame.x_high, 6):
        x = frame.x(value)
        anchor = "end" if x > right - 20 else "middle"  # within the picture
        parts.append(
            _text(
                "tick",
                f'x="{x:.1f}" y="{floor + 16}" text-anchor="{anchor}"',
                number(2**value if chart.is_log_x else value),
            )
        )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{floor}" y2="{floor}"/>')
    parts.append(_text("label", f'x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle"', chart.x_label))
    turned = f'transform="translate(14 {(TOP + floor) / 2}) rotate(-90)" text-anchor="middle"'
    parts.append(_text("label y", turned, chart.y_label))
    return "".join(parts)


def _log_ticks(frame: _Frame) -> range:
    """The powers of two on the axis, at most nine of them."""
    low, high = math.ceil(frame.x_low - 1e-9), math.floor(frame.x_high + 1e-9)
    return range(low, high + 1, max(1, (high - low) // 8))


def _text(kind: str, where: str, text: str) -> str:
    return f'<text class="{kind}" {where}>{escape(visible(text))}</text>'


def _marks(series: Series, index: int, frame: _Frame, is_scatter: bool) -> str:
    style = f"s{index % SERIES_STYLES}"
    if is_scatter:
        dots = (
            f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"/>'
            for x, y in zip(series.x, series.y, strict=True)
        )
        return f'<g class="dots {style}">{"".join(dots)}</g>'
    marks = ""
    if series.low is not None and series.high is not None:
        upper = _path(series.x, series.high, frame)
        lower = _path(list(reversed(series.x)), list(reversed(series.low)), frame)
        marks += f'<polygon class="band {style}" points="{upper} {lower}"/>'
    marks += f'<polyline class="line {style}" points="{_path(series.x, series.y, frame)}"/>'
    if len(series.x) <= 30:
        marks += (
            f'<g class="dots {style}">'
            + "".join(
                f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.5"/>'
                for x, y in zip(series.x, series.y, strict=True)
            )
            + "</g>"
        )
    return marks


def _path(xs: Points, ys: Points, frame: _Frame) -> str:
    return " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(xs, ys, strict=True))


def _legend(numbered: Sequence[tuple[int, Series]]) -> str:
    items = (
        f'<li><svg class="key" viewBox="0 0 24 8" aria-hidden="true"><line class="line s{index % SERIES_STYLES}" '
        f'x1="0" x2="24" y1="4" y2="4"/></svg>{escape(visible(one.name))}</li>'
        for index, one in numbered
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _summary(series: Sequence[Series]) -> str:
    return "; ".join(
        f"{visible(one.name)} from {number(one.y[0])} to {number(one.y[-1])}, "
        f"lowest {number(min(one.y))}, highest {number(max(one.y))}"
        for one in series
    )


def _rounded(values: Points) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
