"""The page of scored completions: how well each measure ranks errors, and the completions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from vdr_cli.errors import DataError
from vdr_cli.report.charts import Chart, Series, number
from vdr_cli.report.content import Page, decoder_of
from vdr_cli.report.data import scored_groups, scored_rows
from vdr_cli.report.intervals import Interval, IntervalChart, ordered
from vdr_cli.scoring.request import BASE_COLUMNS, LABEL

SCORE_CURVES = ("bald_mean", "rmi_mean", "nll_mean", "entropy_mean", "n_tokens")


def score_page(path: Path) -> Page:
    """Risk-coverage curves and the ranking where there are labels, and the completions."""
    from vdr_cli.scoring.parts import read_metadata

    columns = scored_rows(path)
    request = (read_metadata(path) or {}).get("request", {})
    fields = request.get("fields", {})
    label = fields.get("label") or fields.get("implied_label") or LABEL
    charts = []
    if label.partition(".")[0] in columns or label in columns:
        with suppress(DataError):  # not labels but a column of that name, without numbers
            charts.append(_risk_chart(columns, label))
    if "bald_mean" in columns:
        xs, ys = _floats(columns["nll_mean"])[:1500].tolist(), _floats(columns["bald_mean"])[:1500].tolist()
        cloud = [Series("completions", xs, ys)]
        charts.append(Chart("Disagreement against likelihood", "nll a token (nats)", "bald (nats)", cloud, True))
    groups, saved = scored_groups(columns, decoder_of(request.get("model")))
    ranking = _saved_ranking(path)
    header = [name for name in (ranking[0] if ranking else {}) if not name.endswith(("_low", "_high"))]
    facts = [[name, number(float(np.nanmean(_floats(columns[name]))))] for name in SCORE_CURVES if name in columns]
    ensemble = request.get("ensemble") or {}
    return Page(
        title=path.name,
        subtitle=f"{len(columns['nll_mean'])} rows scored by {request.get('model', 'an unknown model')}, "
        f"{ensemble.get('members', 0)} members, seed {request.get('seed')}",
        charts=charts,
        groups=groups,
        groups_saved=saved,
        facts_header=["mean"],
        facts=facts,
        facts_note="",
        ranking_header=header,
        ranking=[[_interval(row, name) for name in header] for row in ranking],
        ranked=_ranked(ranking),
        heat="disagreement" if "token_bald" in columns else "entropy",
        command=("vdr score --tokens", "saves the numbers of each token"),
    )


def _ranked(ranking: Sequence[Mapping[str, Any]]) -> IntervalChart | None:
    """The AUROC of every column, PRR where the labels are a quality."""
    if not ranking:
        return None
    number = "auroc" if "auroc" in ranking[0] else "prr"
    rows = [
        Interval(
            name=row["measure"],
            value=_or_nan(row[number]),
            low=_or_nan(row[f"{number}_low"]),
            high=_or_nan(row[f"{number}_high"]),
            is_baseline=row["measure"] in BASE_COLUMNS,
        )
        for row in ranking
    ]
    name, chance = ("AUROC", 0.5) if number == "auroc" else ("PRR", 0.0)
    chart = IntervalChart(f"{name} with 95 % intervals", f"{name}; {chance:g} is chance", rows, chance)
    return chart if ordered(chart) else None


def _or_nan(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _risk_chart(columns: Mapping[str, Sequence[Any]], label: str) -> Chart:
    """Losses of the most certain rows, for each column that ranks them."""
    from vdr_cli.scoring.cells import value_at
    from vdr_cli.scoring.ranking import loss_of
    from vdr_cli.stats.ranking import Ranked, risk_coverage

    root = label if label in columns else label.partition(".")[0]
    is_binary, losses = loss_of(_floats([value_at({root: value}, label) for value in columns[root]]))
    curves = []
    for name in [name for name in SCORE_CURVES if name in columns]:
        values = _floats(columns[name])
        kept = np.isfinite(values) & np.isfinite(losses)
        coverage, risk = risk_coverage(Ranked.of(values[kept], losses[kept]))
        curves.append(Series(name, coverage.tolist(), risk.tolist()))
    unit = "share wrong" if is_binary else f"mean of -{label}"
    return Chart("Risk against coverage", "share kept, most certain first", unit, curves)


def _saved_ranking(path: Path) -> list[dict[str, Any]]:
    saved = Path(str(path) + ".ranking.json")
    loaded = json.loads(saved.read_text(encoding="utf-8")) if saved.is_file() else []
    return loaded if isinstance(loaded, list) else []


def _interval(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, int | float):
        return "" if value is None else str(value)
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")  # null where there was one group
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _floats(values: Sequence[Any]) -> np.ndarray:
    from vdr_cli.scoring.ranking import as_number

    return np.array([as_number(value, "a cell") for value in values])
