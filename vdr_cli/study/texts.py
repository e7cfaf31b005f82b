"""A study's findings in words and tables, which study.md and study.html share. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vdr_cli.config.yaml_text import dump_tree
from vdr_cli.stats.paired import detectable_deviations
from vdr_cli.study.analysis import Difference, Row, Rows, best_first, contrasts, start_value
from vdr_cli.study.curves import RunMetrics
from vdr_cli.study.endpoints import described
from vdr_cli.study.record import Record
from vdr_cli.system.text import duration


@dataclass(frozen=True)
class Table:
    """A table with a heading column."""

    header: list[str]
    rows: list[list[str]]


def setup_line(record: Record) -> str:
    """The study in one sentence."""
    file, study = record.study.file, record.study
    end = {
        "steps": f"{file.budget.steps:,} steps" if file.budget.steps else "",
        "seconds": f"{file.budget.seconds:g} seconds of training" if file.budget.seconds else "",
        "tokens": f"{file.budget.sampled_tokens:,} sampled tokens" if file.budget.sampled_tokens else "",
    }
    beds = ", ".join(study.beds)
    tuned = f", each tuned with {_many(study.trials, 'trial')} on other seeds" if study.trials else ""
    return (
        f"{_many(len(study.arms), 'arm')} with {_many(len(file.seeds), 'seed')} on {beds}; every run ends after "
        f"{next(filter(None, end.values()))}{tuned}."
    )


def endpoint_line(record: Record) -> str:
    """The endpoint in one sentence."""
    file = record.study.file
    prompts = max((len(rows) for rows in record.rows.values()), default=0)
    words = described(file.endpoint, file.evaluation.samples)
    return (
        f"Endpoint: {file.endpoint}, the {words}, of the last checkpoint on {_many(prompts, 'held-out problem')} "
        f"with {_many(file.evaluation.samples, 'completion')} each."
    )


def missing_line(record: Record) -> str:
    """The runs that are not there; empty when all are."""
    study = record.study
    wanted = len(study.arms) * len(study.beds) * len(study.file.seeds)
    gone = wanted - len(record.runs)
    return f"{gone} of {_many(wanted, 'run')} missing: this is what the others say." if gone else ""


def answers(record: Record, rows: Rows) -> dict[str, list[str]]:
    """Bed to what was found there, a sentence a kind of verdict."""
    name = record.study.file.endpoint
    return {bed: _answer(record, rows[bed][name], start_value(record, bed, name)) for bed in record.study.beds}


def _answer(record: Record, rows: Mapping[str, Row], start: float | None) -> list[str]:
    file = record.study.file
    control = rows[file.control]
    begun = "" if start is None else f" The starting model has {number(start)}."
    reached = f"{number(control.mean)}{_interval(control.low, control.high)}"
    lines = [
        f"{file.control} reaches {file.endpoint} {reached}.{begun}" if control.n else f"{file.control} has no run."
    ]
    judged = {arm: row.difference for arm, row in rows.items() if row.difference is not None}
    ranked = best_first(judged, record.study.lower_is_better)
    for word, text in (
        ("better", "Better than {control}: {arms}."),
        ("worse", "Worse than {control}: {arms}."),
        ("equivalent", "Equivalent to {control}, within ±{bound}: {arms}."),
        ("undecided", "No difference shown, none excluded: {arms}."),
        ("no spread", "The same difference for every seed, so it cannot be tested: {arms}."),
        ("no interval", "Too few seeds for an interval: {arms}."),
        ("no runs", "No pair of runs: {arms}."),
    ):
        chosen = [f"{arm} ({_found(d)})" if d.n else arm for arm, d in ranked if d.verdict.partition(",")[0] == word]
        if chosen:
            lines.append(text.format(control=file.control, bound=f"{file.equivalence:g}", arms=", ".join(chosen)))
    return lines


def _found(difference: Difference) -> str:
    small = ", too small to matter" if difference.verdict.endswith("negligible") else ""
    return f"{_signed(difference.value)}{_interval(difference.low, difference.high)}{small}"


def main_table(record: Record, rows: Rows, bed: str, runs: Sequence[RunMetrics]) -> Table:
    """An arm a row: the endpoint, its difference from the control, the verdict, what it cost."""
    file = record.study.file
    header = ["arm", "n", file.endpoint, f"difference from {file.control}", "p (Holm)", "verdict"]
    header += ["steps", "time per run", "tokens per run", "detectable"]
    lines = []
    for arm, row in rows[bed][file.endpoint].items():
        spent = _spent([one for one in runs if (one.run.bed, one.run.arm) == (bed, arm)])
        lines.append(
            [
                arm,
                str(row.n),
                _with_interval(row),
                *_judgement(row.difference),
                *spent,
                _detectable(row.difference),
            ]
        )
    return Table(header, lines)


def _spent(runs: Sequence[RunMetrics]) -> list[str]:
    """Steps, time and tokens of a run, in the mean."""
    if not runs:
        return ["", "", ""]
    steps, tokens = _average([one.run.steps for one in runs]), _average([one.run.tokens for one in runs])
    return [f"{steps:,.0f}", duration(_average([one.seconds for one in runs])), f"{tokens:,.0f}"]


def _judgement(difference: Difference | None) -> list[str]:
    """Difference, adjusted p, verdict."""
    if difference is None:
        return ["", "", "control"]
    shown = f"{_signed(difference.value)}{_interval(difference.low, difference.high)}"
    p = "" if difference.p_holm is None or math.isnan(difference.p) else p_text(difference.p_holm)
    return [shown, p, difference.verdict]


def _detectable(difference: Difference | None) -> str:
    return "" if difference is None else number(difference.detectable)


def secondary_table(record: Record, rows: Rows, bed: str) -> Table:
    """An arm a row: the control's means, and the differences of every other arm to them."""
    names = [name for name in rows[bed] if name != record.study.file.endpoint]
    lines = []
    for arm in record.study.arms:
        cells = []
        for name in names:
            row = rows[bed][name][arm]
            difference = row.difference
            shown = _with_interval(row) if difference is None else ""
            cells.append(
                shown
                if difference is None
                else f"{_signed(difference.value)}{_interval(difference.low, difference.high)}"
            )
        lines.append([arm, *cells])
    return Table(["arm", *names], lines)


def contrasts_table(record: Record, bed: str) -> Table:
    """A pair of arms a row: the first minus the second, by the endpoint."""
    rows = [
        [f"{first} minus {second}", str(d.n), f"{_signed(d.value)}{_interval(d.low, d.high)}"]
        for first, second, d in contrasts(record, bed)
    ]
    return Table(["pair", "n", f"difference of {record.study.file.endpoint}"], rows)


def tuning_table(record: Record) -> Table:
    """Every trial: what it changed, and its endpoint."""
    tuning = record.study.file.tuning
    rows = [
        [
            row["bed"], row["arm"], settings_text(tuning.trials[row["arm"]][row["trial"]]) if tuning else "",
            "" if row["value"] is None else number(row["value"]), "taken" if row["taken"] else "",
        ]
        for row in record.tuning
    ]  # fmt: skip
    return Table(["bed", "arm", "settings tried", record.study.file.endpoint, ""], rows)


def arms_table(record: Record) -> Table:
    """The settings that each arm changes."""
    return Table(["arm", "settings"], [[arm, settings_text(record.study.file.arms[arm])] for arm in record.study.arms])


def common_line(record: Record) -> str:
    """The order in which the settings apply."""
    tuned = ", then the trial taken" if record.study.trials else ""
    return f"A run has the settings of the base, changed by those of its bed, then its arm{tuned}."


def common_table(record: Record) -> Table:
    """The settings that the arms share: of the base, and of each bed."""
    file = record.study.file
    beds = [[f"bed {bed}", settings_text(settings)] for bed, settings in file.beds.items()]
    return Table(["of", "settings"], [["base", settings_text(file.base, "the defaults")], *beds])


def settings_text(settings: Mapping[str, object], empty: str = "as the base") -> str:
    """Settings on one line, dotted: `disagreement.mode: none, grpo.beta: 0.1`."""
    return ", ".join(f"{key}: {_value_text(value)}" for key, value in _flat(settings).items()) or empty


def _value_text(value: object) -> str:
    """YAML on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_value_text, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_value_text(inner)}' for key, inner in value.items())}}}"
    return dump_tree({"x": value})[3:].strip()


def _flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def method_lines(record: Record) -> list[str]:
    """Notes for readers of the numbers."""
    file, study = record.study.file, record.study
    found = detectable_deviations(len(file.seeds), study.comparisons)
    tail = (
        f" With Holm's correction: {found:.2g} standard deviations of a seed's difference." if found < math.inf else ""
    )
    return [
        "A difference is between two runs with the same seed: the same training prompts, random numbers and held-out "
        "problems.",
        "Brackets and bands are 95 % intervals. They allow for other seeds and for other problems of the same kind: "
        "Student's interval from the variance components of the table of seeds and problems.",
        f"p is adjusted by Holm's method for {_many(study.comparisons, 'comparison')}: where no arm differs, the study "
        "names one with probability 5 % at most. Only the endpoint is tested; the other numbers have intervals.",
        f"Equivalent: the 90 % interval lies within ±{file.equivalence:g} (two one-sided tests). Undecided: neither.",
        "Detectable: the difference that a single comparison finds with probability 0.8 at the spread seen here."
        + tail,
        "Time is of training steps alone. The last checkpoint counts, not the best.",
    ]


# ---- numbers -----------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three decimals, fewer for large numbers; empty for none."""
    if not math.isfinite(value):
        return ""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _signed(value: float) -> str:
    """A sign always, a true minus, and 0 without one."""
    text = number(abs(value))
    if not text or not text.strip("0."):
        return text
    return ("+" if value > 0 else "\u2212") + text


def _interval(low: float, high: float) -> str:
    return f" [{_bound(low)}, {_bound(high)}]" if math.isfinite(low) and math.isfinite(high) else ""


def _bound(value: float) -> str:
    text = number(abs(value))
    return text if value >= 0 or not text.strip("0.") else "\u2212" + text


def _with_interval(row: Row) -> str:
    return f"{number(row.mean)}{_interval(row.low, row.high)}"


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _many(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"
