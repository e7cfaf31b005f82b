import math
import re
from xml.etree import ElementTree

import pytest

from vdr_cli.report.charts import MAX_POINTS, Chart, Series, finite, number, svg, thinned, ticks


def parsed(chart: Chart) -> ElementTree.Element:
    return ElementTree.fromstring(f"<all>{svg(chart)}</all>")


def test_points_land_where_the_axes_say() -> None:
    chart = parsed(Chart("Reward", "step", "reward", [Series("run", [0, 10], [0.0, 1.0])]))
    (line,) = chart.iter("polyline")
    (x0, y0), (x1, y1) = ([float(v) for v in point.split(",")] for point in line.get("points", "").split())
    assert x0 < x1
    assert y0 > y1
    ticks_at = {
        text.text: (float(text.get("x", 0)), float(text.get("y", 0))) for text in chart.iter("text") if text.get("x")
    }
    assert ticks_at["10"][0] == pytest.approx(x1, abs=0.2)
    assert ticks_at["1"][1] == pytest.approx(y1 + 4, abs=0.2)


def test_hostile_names_are_text_in_every_place() -> None:
    name = '"><script>alert(1)</script>\x1b'
    markup = svg(Chart(name, name, name, [Series(name, [1, 2], [1, 2]), Series("b", [1, 2], [2, 3])]))
    assert "<script" not in markup
    assert "\x1b" not in markup
    ElementTree.fromstring(f"<all>{markup}</all>")


def test_bands_legends_and_scatter() -> None:
    band = Series("a", [1, 2], [1, 2], [0, 1], [2, 3])
    chart = parsed(Chart("t", "x", "y", [band, Series("b", [1, 2], [3, 4])]))
    assert len(list(chart.iter("polygon"))) == 1
    assert [item.text or "".join(item.itertext()) for item in chart.iter("li")] == ["a", "b"]
    dots = parsed(Chart("t", "x", "y", [band], is_scatter=True))
    assert len(list(dots.iter("circle"))) == 2
    assert not list(dots.iter("polyline"))


def test_points_that_are_no_numbers_are_left_out() -> None:
    kept = finite(Series("a", [1, 2, 3], [1.0, math.nan, math.inf], [0, 0, 0], [math.nan, 1, 1]))
    assert (list(kept.x), list(kept.y), kept.low, kept.high) == ([1], [1.0], [0], [1.0])
    assert "Nothing was measured" in svg(Chart("t", "x", "y", [Series("a", [1], [math.nan])]))


def test_one_point_and_a_flat_line_can_be_drawn() -> None:
    for series in (Series("a", [5], [0.0]), Series("a", [1, 2], [3.0, 3.0])):
        assert "nan" not in svg(Chart("t", "x", "y", [series])).lower()


def test_long_runs_are_thinned_to_means_and_extremes() -> None:
    thin = thinned(Series("a", list(range(10_000)), [index % 2 for index in range(10_000)]))
    assert len(thin.x) == MAX_POINTS
    assert thin.y == pytest.approx([0.5] * MAX_POINTS, abs=0.03)
    assert thin.low is not None
    assert thin.high is not None
    assert set(thin.low) == {0}
    assert set(thin.high) == {1}


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7), (1e-7, 3e-7), (0, 12345), (0.99, 1.01)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 3 <= len(found) <= 7
    assert all(low - 1e-12 <= value <= high * (1 + 1e-9) for value in found)
    assert all(len(re.sub(r"e.*|[^0-9]", "", number(value)).strip("0")) <= 4 for value in found)


def test_numbers_are_short() -> None:
    assert [number(value) for value in (0, 0.25, 1234.5, 3.14159e-5)] == ["0", "0.25", "1,234", "3.142e-05"]
