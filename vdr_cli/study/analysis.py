"""Means, paired differences from the control, tests and verdicts, from the counts of the runs. Pure.

The endpoint alone is tested. Holm's correction counts every rival on every bed: where no arm differs from the control,
the whole study names one with probability 5 % at most. Other numbers come with intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vdr_cli.stats.bootstrap import LEVEL
from vdr_cli.stats.paired import Mean, holm, mean_over_seeds, mean_over_seeds_and_prompts
from vdr_cli.study.endpoints import LOWER_IS_BETTER, ks_up_to, pass_at, value_of
from vdr_cli.study.record import Record, RunRecord

ALPHA = 1.0 - LEVEL
Value = NDArray[np.float64] | float
"""One value a prompt, (P,), or one for the run."""


@dataclass(frozen=True)
class Difference:
    """An arm minus the control, seed by seed. nan: too few seeds to say."""

    n: int
    """Seeds that both have."""
    value: float
    low: float
    high: float
    seeds: dict[int, float]
    """Seed to the difference of its two runs."""
    p: float
    detectable: float
    """The difference that would have been found with probability 0.8, before Holm's correction."""
    p_equivalent: float = math.nan
    p_holm: float | None = None
    """None for numbers that are not tested."""
    verdict: str = ""
    """better, worse, equivalent, undecided, or why there is none (see verdict_of); of the endpoint only."""


@dataclass(frozen=True)
class Row:
    """One number of one arm on one bed."""

    n: int
    mean: float
    low: float
    high: float
    seeds: dict[int, float]
    difference: Difference | None
    """None for the control."""


@dataclass(frozen=True)
class Curve:
    """pass@k of an arm, with its interval over seeds and prompts."""

    k: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


Rows = dict[str, dict[str, dict[str, Row]]]
"""Bed, number, arm."""


def analysed(record: Record) -> Rows:
    """Every number of every arm on every bed."""
    file = record.study.file
    names = list(dict.fromkeys([file.endpoint, *file.secondary]))
    rows = {
        bed: {name: {arm: _row(record, bed, arm, name) for arm in record.study.arms} for name in names}
        for bed in record.study.beds
    }
    return _judged(record, rows)


def contrasts(
    record: Record, bed: str, pairs: Iterable[tuple[str, str]] | None = None
) -> list[tuple[str, str, Difference]]:
    """The endpoint of one arm minus another's, for these pairs, or else those that the study names."""
    name = record.study.file.endpoint
    values = {arm: _values(record, bed, arm, name) for arm in record.study.arms}
    chosen = record.study.file.contrasts if pairs is None else pairs
    return [(first, second, _difference_of(record, values[first], values[second])) for first, second in chosen]


def start_value(record: Record, bed: str, name: str) -> float | None:
    """The number of the bed's starting model; None where it is not one of a model alone, or was not measured.

    More completions have more classes, so these can be compared only where the start has as many as the runs.
    """
    start = record.start(bed)
    if start is None or not (name.startswith("pass@") or name in ("classes", "reward")):
        return None
    if name == "classes" and start.samples != record.study.file.evaluation.samples:
        return None
    return float(np.mean(value_of(name, start, start)))


def curves(record: Record, bed: str) -> dict[str, Curve]:
    """Arm to its pass@k; the starting model's is under the empty name."""
    found = {}
    for arm in record.study.arms:
        runs = [run.measured for run in record.of(bed, arm).values()]
        if runs:
            tables = {
                k: np.stack([pass_at(run.samples, run.solved, k) for run in runs]) for k in ks_up_to(runs[0].samples)
            }
            found[arm] = _curve({k: mean_over_seeds_and_prompts(table) for k, table in tables.items()})
    if (start := record.start(bed)) is not None:
        most = ks_up_to(record.study.file.evaluation.samples)
        ks = [k for k in most if k <= start.samples]
        found[""] = _curve({k: mean_over_seeds(pass_at(start.samples, start.solved, k)) for k in ks})
    return found


def _curve(means: Mapping[int, Mean]) -> Curve:
    edges = [_share_interval(mean) for mean in means.values()]
    return Curve(
        list(means), [mean.value for mean in means.values()], [low for low, _ in edges], [high for _, high in edges]
    )


def _share_interval(mean: Mean) -> tuple[float, float]:
    """The interval of a share, which lies between 0 and 1."""
    low, high = mean.interval()
    return (max(low, 0.0), min(high, 1.0)) if math.isfinite(low) else (low, high)


def _row(record: Record, bed: str, arm: str, name: str) -> Row:
    own = _values(record, bed, arm, name)
    mean = _mean(list(own.values()))
    low, high = _share_interval(mean) if name.startswith("pass@") or name == "area" else mean.interval()
    return Row(len(own), mean.value, low, high, _scalars(own), _difference(record, bed, arm, name, own))


def _difference(record: Record, bed: str, arm: str, name: str, own: Mapping[int, Value]) -> Difference | None:
    control = record.study.file.control
    return None if arm == control else _difference_of(record, own, _values(record, bed, control, name))


def _difference_of(record: Record, own: Mapping[int, Value], theirs: Mapping[int, Value]) -> Difference:
    """The first minus the second, over the seeds that both have."""
    paired = {seed: value - theirs[seed] for seed, value in own.items() if seed in theirs}
    mean = _mean(list(paired.values()))
    low, high = mean.interval()
    return Difference(
        len(paired),
        mean.value,
        low,
        high,
        _scalars(paired),
        mean.p_value(),
        mean.detectable(),
        _equivalence(record, mean),
    )


def _equivalence(record: Record, mean: Mean) -> float:
    return mean.p_equivalent(record.study.file.equivalence)


def _values(record: Record, bed: str, arm: str, name: str) -> dict[int, Value]:
    """Seed to the number of its run, in the order of the study's seeds."""
    start, runs = record.start(bed), record.of(bed, arm)
    ordered: list[tuple[int, RunRecord]] = [(seed, runs[seed]) for seed in record.study.file.seeds if seed in runs]
    return {seed: value_of(name, run.measured, start) for seed, run in ordered}


def _mean(values: list[Value]) -> Mean:
    if not values:
        return Mean(math.nan, math.nan, math.nan)
    stacked = np.stack([np.asarray(value, np.float64) for value in values])
    return mean_over_seeds_and_prompts(stacked) if stacked.ndim == 2 else mean_over_seeds(stacked)


def _scalars(values: Mapping[int, Value]) -> dict[int, float]:
    return {seed: float(np.mean(value)) for seed, value in values.items()}


def _judged(record: Record, rows: Rows) -> Rows:
    """The endpoint's differences with adjusted p and verdict."""
    name = record.study.file.endpoint
    found = [(bed, arm, row.difference) for bed in rows for arm, row in rows[bed][name].items() if row.difference]
    adjusted = holm([difference.p for _, _, difference in found])
    for (bed, arm, difference), p in zip(found, adjusted, strict=True):
        verdict = verdict_of(difference, p, name in LOWER_IS_BETTER)
        judged = replace(difference, p_holm=p, verdict=verdict)
        rows[bed][name][arm] = replace(rows[bed][name][arm], difference=judged)
    return rows


def verdict_of(difference: Difference, p_holm: float, lower_is_better: bool) -> str:
    """better or worse by the adjusted p; equivalent by two one-sided tests; both, or undecided.

    no spread: all differences are equal, so there is no test. no interval, no runs: too few seeds.
    """
    is_equivalent = difference.p_equivalent < ALPHA
    if p_holm < ALPHA and difference.value != 0:
        word = "better" if (difference.value > 0) is not lower_is_better else "worse"
        return f"{word}, negligible" if is_equivalent else word
    if difference.n < 2:
        return "no interval" if difference.n else "no runs"
    if math.isfinite(difference.value) and math.isnan(difference.p):
        return "no spread"
    return "equivalent" if is_equivalent else "undecided"


def best_first(differences: Mapping[str, Difference], lower_is_better: bool) -> list[tuple[str, Difference]]:
    """Arms with their differences, the best first; those without a value last."""
    sign = 1.0 if lower_is_better else -1.0
    known = [pair for pair in differences.items() if not math.isnan(pair[1].value)]
    unknown = [pair for pair in differences.items() if math.isnan(pair[1].value)]
    return sorted(known, key=lambda pair: sign * pair[1].value) + unknown
