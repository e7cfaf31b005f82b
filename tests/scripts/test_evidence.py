"""The evidence's scripts: rank statistics and the figures; the reports of the studies of record."""

from __future__ import annotations

import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr, rankdata, spearmanr

from tests.study.conftest import make_study  # noqa: F401
from vdr_cli.config.load import dump_config
from vdr_cli.config.yaml_text import dump_tree
from vdr_cli.study.analysis import analysed
from vdr_cli.study.directory import study_tree
from vdr_cli.study.page import archive, rebuild, write_results
from vdr_cli.study.plan import runs_of
from vdr_cli.study.record import read_record, record_of

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def validity() -> dict[str, Any]:
    sys.path.insert(0, str(SCRIPTS / "bench"))
    return runpy.run_path(str(SCRIPTS / "bench" / "validity.py"))


def test_correlation_is_the_mean_of_spearmans_over_groups(validity: dict[str, Any]) -> None:
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=(2, 40))
    other[10:20] = 3.0  # a group in which nothing differs tells nothing
    groups = [list(range(at, at + 10)) for at in range(0, 40, 10)]
    found = validity["correlation"](validity["ranks"](one, groups), validity["ranks"](other, groups))
    each = [spearmanr(one[rows], other[rows]).statistic for rows in groups if rows[0] != 10]
    assert found["value"] == pytest.approx(np.mean(each))
    assert found["low"] < found["value"] < found["high"]


def test_partial_correlation_is_that_of_the_residuals(validity: dict[str, Any]) -> None:
    """Within one group, against the closed form for one given variable."""
    generator = np.random.default_rng(1)
    given = generator.normal(size=60)
    one, other = given + generator.normal(size=60), given + generator.normal(size=60)
    rows = [list(range(60))]
    found = validity["partial"](*(validity["ranks"](x, rows) for x in (one, other)), [validity["ranks"](given, rows)])
    a, b, c = (rankdata(x) for x in (one, other, given))
    ab, ac, bc = (pearsonr(x, y).statistic for x, y in ((a, b), (a, c), (b, c)))
    assert found["value"] == pytest.approx((ab - ac * bc) / np.sqrt((1 - ac**2) * (1 - bc**2)))


@pytest.fixture
def registered(make_study: Callable[..., Any], tmp_path: Path) -> Path:  # noqa: F811
    """A bed's directory: its study file and the archive of its record."""
    study, directory = make_study(seeds=3)
    for task in runs_of(study):
        (directory.run(task) / "config.yaml").write_text(dump_config(study.config(task.bed, task.arm, task.seed)))
    write_results(record_of(study, directory), directory.path)
    bed = tmp_path / "bed"
    archive(directory.path, bed / "record")
    (bed / "study.yaml").write_text(dump_tree({"output": str(tmp_path / "elsewhere"), **study_tree(study)}))
    return bed


RECORDS = sorted((Path(__file__).parents[2] / "docs" / "evidence").glob("*/record"))


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.parent.name)
def test_the_report_of_the_study_of_record_is_rebuilt_byte_for_byte(record: Path, tmp_path: Path) -> None:
    made = tmp_path / record.name
    shutil.copytree(record, made, ignore=shutil.ignore_patterns("*.md", "*.html"))
    rebuild(made)
    for name in ("study.json", "study.md", "study.html"):
        assert (made / name).read_bytes() == (record / name).read_bytes(), name


def test_the_figures_show_control_and_best_rival(registered: Path) -> None:
    pytest.importorskip("matplotlib")
    script = runpy.run_path(str(SCRIPTS / "build" / "evidence.py"))
    records = {"bed": read_record(registered / "record")}
    curves, *blank = script["ends"](records).axes
    assert [line.get_label() for line in curves.get_lines()] == ["start", "grpo", "pass_at_k"]
    assert curves.get_title() == "bed\nbest rival: pass_at_k"
    assert not any(axes.axison for axes in blank)
    (panel,) = script["differences"](records).axes
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert names == ["bald_per_token", "disagreement", "pass_at_k"]  # the best at the top


def test_an_endpoint_that_is_no_pass_at_k_is_drawn_as_differences(registered: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    script = runpy.run_path(str(SCRIPTS / "build" / "evidence.py"))
    record = read_record(registered / "record")
    axes = Figure().subplots()
    script["draw_endpoint"](axes, record)
    assert [name.get_text() for name in axes.get_yticklabels()] == ["pass_at_k", "grpo", "start"]
    (rows,) = (rows[record.study.file.endpoint] for rows in analysed(record).values())
    row, control = rows["pass_at_k"], rows["grpo"].mean
    dot, bar = axes.get_lines()[:2]
    assert list(dot.get_xdata()) == [row.mean]
    assert tuple(bar.get_xdata()) == (control + row.difference.low, control + row.difference.high)
