import math
from xml.etree import ElementTree

from vdr_cli.report.intervals import Interval, IntervalChart, interval_svg, ordered

CHART = IntervalChart(
    "AUROC",
    "AUROC",
    [
        Interval("nll_mean", 0.6, 0.5, 0.7, True),
        Interval("<b>", 0.8, 0.7, 0.9, False),
        Interval("none", math.nan, math.nan, math.nan, False),
    ],
    0.5,
)


def test_highest_first_and_what_has_no_number_left_out() -> None:
    assert [row.name for row in ordered(CHART)] == ["<b>", "nll_mean"]


def test_dots_lie_inside_their_intervals_and_names_are_text() -> None:
    svg = ElementTree.fromstring(interval_svg(CHART))
    dots = [float(dot.get("cx", "")) for dot in svg.iter("circle")]
    ranges = [line for line in svg.iter("line") if "range" in line.get("class", "")]
    assert [line.get("class") for line in ranges] == ["range s0", "range s1"]
    for dot, line in zip(dots, ranges, strict=True):
        assert float(line.get("x1", "")) < dot < float(line.get("x2", ""))
    chance = next(line for line in svg.iter("line") if line.get("class") == "chance")
    assert float(chance.get("x1", "")) == float(ranges[1].get("x1", ""))
    assert "<b>" in [text.text for text in svg.iter("text")]
