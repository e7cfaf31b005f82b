"""Learning curves and what a study has cost, from the metrics of its runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vdr_cli.report.charts import Series
from vdr_cli.stats.paired import mean_over_seeds
from vdr_cli.study.archive import Metrics, kept_run
from vdr_cli.study.record import Record, RunRecord

SHOWN = (
    ("eval/pass@", "Held-out {name} during training", "{name}"),
    ("reward", "Mean task reward", "reward"),
    ("entropy", "Entropy", "nats"),
    ("frac_reward_zero_std", "Groups whose rewards are all equal", "share"),
    ("completions/mean_length", "Completion length", "tokens"),
)
"""Metrics with curves: beginning of the name, title, unit."""


@dataclass(frozen=True)
class RunMetrics:
    """The metrics of one run."""

    run: RunRecord
    values: Metrics

    @property
    def seconds(self) -> float:
        """Seconds of the training steps that count: those of a resumed run that were done again count once."""
        return math.fsum(self.values.get("step_time", {}).values())


def read_runs(record: Record, directory: Path) -> list[RunMetrics]:
    """The metrics of every run of record, from its directory or the archive. Raises ConfigError when one's are gone."""
    return [RunMetrics(run, kept_run(directory, run.task).metrics) for run in record.runs]


def shown_metrics(runs: list[RunMetrics]) -> list[tuple[str, str, str]]:
    """(metric, title, unit) of those that were measured, in the order of SHOWN."""
    names = dict.fromkeys(name for one in runs for name in one.values)
    found = []
    for start, title, unit in SHOWN:
        for name in names:
            is_pass = start.endswith("@") and name.startswith(start) and name.removeprefix(start).isdigit()
            if is_pass or name == start:
                shown = name.removeprefix("eval/")
                found.append((name, title.format(name=shown), unit.format(name=shown)))
    return found


def learning_curve(name: str, runs: list[RunMetrics], metric: str) -> Series:
    """The mean over runs at every step that all of them have, with its 95 % interval over seeds as a band."""
    own = [one.values[metric] for one in runs if metric in one.values]
    steps = sorted(set.intersection(*map(set, own))) if own else []
    means = [mean_over_seeds(np.array([values[step] for values in own])) for step in steps]
    edges = [mean.interval() for mean in means]
    if len(own) < 2:
        return Series(name, steps, [mean.value for mean in means])
    low, high = [low for low, _ in edges], [high for _, high in edges]
    return Series(name, steps, [mean.value for mean in means], low, high)
