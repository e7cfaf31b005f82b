"""The report's charts as PNG files."""

from __future__ import annotations

from pathlib import Path

import pytest

from vdr_cli.report.charts import Chart, Series
from vdr_cli.report.intervals import Interval, IntervalChart
from vdr_cli.report.pictures import write_intervals_png, write_png

pytest.importorskip("matplotlib")
PNG = b"\x89PNG\r\n\x1a\n"


def test_a_chart_is_named_after_its_title(tmp_path: Path) -> None:
    series = (
        Series("one", [0.0, 1.0], [1.0, 2.0], [0.5, 1.5], [1.5, 2.5]),
        Series("costs $5 \x1b[31m", [0.0, 1.0], [2.0, float("nan")]),
        Series("empty", [], []),
    )
    path = write_png(Chart("Held-out pass@1", "step", "pass@1", series), tmp_path)
    assert path == tmp_path / "held_out_pass_1.png"
    assert path.read_bytes().startswith(PNG)


def test_points_are_drawn_as_points(tmp_path: Path) -> None:
    chart = Chart("Reward", "disagreement", "reward", (Series("run", [0.0, 1.0], [1.0, 0.0]),), is_scatter=True)
    assert write_png(chart, tmp_path).read_bytes().startswith(PNG)


def test_intervals_have_a_picture(tmp_path: Path) -> None:
    rows = (Interval("bald_mean", 0.7, 0.6, 0.8, False), Interval("nll_mean", 0.6, 0.5, 0.7, True))
    path = write_intervals_png(IntervalChart("AUROC with 95 % intervals", "AUROC", rows, 0.5), tmp_path)
    assert path.name == "auroc_with_95_intervals.png" and path.read_bytes().startswith(PNG)
