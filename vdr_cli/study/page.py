"""study.html and study.md: a study's findings, for a reader who has not read the documentation.

Both follow from study.json and the runs' metrics alone. The page forbids itself every request; all text is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from vdr_cli.config.yaml_text import dump_tree
from vdr_cli.errors import MachineError
from vdr_cli.report.charts import Chart, Series, svg
from vdr_cli.study import texts
from vdr_cli.study.analysis import Curve, Row, Rows, analysed, best_first, curves, start_value
from vdr_cli.study.archive import ARCHIVE, CONFIGS, kept_run, name_of, settings_text, write_archive
from vdr_cli.study.archive_checks import check_source, check_target
from vdr_cli.study.curves import RunMetrics, learning_curve, read_runs, shown_metrics
from vdr_cli.study.directory import STUDY_FILE, study_tree
from vdr_cli.study.drawing import RangeRow, ranges_svg
from vdr_cli.study.endpoints import described
from vdr_cli.study.record import RESULTS, Record, read_record, record_text
from vdr_cli.study.texts import Table
from vdr_cli.system.files import replacing, write_whole
from vdr_cli.system.text import visible

START = "start"
ARM_STYLES = 6
"""Styles 1 to 6 are the rivals'; 0 is the control's, 7 the starting model's."""


@dataclass(frozen=True)
class Panel:
    """A chart with its caption."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class Bed:
    """The sections of one bed."""

    name: str
    answers: list[str]
    differences: Markup
    endpoints: Markup
    main: Table
    secondary: Table
    contrasts: Table
    passes: list[Panel]
    learning: list[tuple[str, list[Panel]]]
    """Title of a metric, and its panels."""


def write_results(record: Record, directory: Path) -> list[Path]:
    """Write study.json, study.md and study.html; their paths. Raises MachineError when the disk refuses."""
    files = result_texts(record, directory)
    try:
        for name, text in files.items():
            write_whole(directory / name, text)
    except OSError as error:
        raise MachineError(f"{directory}: the results cannot be written ({error.strerror})") from None
    return [directory / name for name in files]


def result_texts(record: Record, directory: Path) -> dict[str, str]:
    """Name to text of the results, from the record and the directory's metrics. Raises DataError."""
    rows, runs = analysed(record), read_runs(record, directory)
    results = {bed: {name: {arm: asdict(row) for arm, row in arms.items()} for name, arms in names.items()}
               for bed, names in rows.items()}  # fmt: skip
    return {
        RESULTS: record_text(record, results),
        "study.md": markdown(record, rows, runs),
        "study.html": html(record, rows, runs),
    }


def rebuild(directory: Path) -> list[Path]:
    """Write the results again from study.json and the runs' metrics. Raises VdrError."""
    return write_results(read_record(directory), directory)


def archive(directory: Path, target: Path) -> list[Path]:
    """Write a small copy of the study, from which its report can be rebuilt; the paths.

    The target becomes the archive, or stays as it was. Raises VdrError.
    """
    record = read_record(directory)
    check_source(record, directory)
    check_target(record, directory, target)
    runs, configs = {run.task: kept_run(directory, run.task) for run in record.runs}, _configs(record, directory)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as partial:
            write_archive(runs, configs, partial)
            texts_of_files = {STUDY_FILE: dump_tree(study_tree(record.study)), **result_texts(record, partial)}
            for name, text in texts_of_files.items():
                (partial / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise MachineError(f"{target}: the archive cannot be written ({error.strerror})") from None
    return [target / name for name in (*texts_of_files, ARCHIVE, CONFIGS)]


def _configs(record: Record, directory: Path) -> dict[str, str]:
    """BED-ARM to the settings of the arm's first run, as the run or the archive has them."""
    first = {(run.bed, run.arm): run.task for run in reversed(record.runs)}
    return {name_of(task): settings_text(directory, task) for task in first.values()}


# ---- study.html --------------------------------------------------------------------------------------------------


def html(record: Record, rows: Rows, runs: Sequence[RunMetrics]) -> str:
    """The page."""
    loaders = [jinja2.PackageLoader("vdr_cli.study"), jinja2.PackageLoader("vdr_cli.report")]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("study.html.j2").render(
        title=visible(record.title),
        setup=visible(texts.setup_line(record)),
        endpoint=visible(texts.endpoint_line(record)),
        missing=texts.missing_line(record),
        beds=[_bed(record, rows, bed, runs) for bed in record.study.beds],
        many=len(record.study.beds) > 1,
        control=visible(record.study.file.control),
        name=visible(record.study.file.endpoint),
        bound=f"{record.study.file.equivalence:g}",
        meanings=[(name, described(name, record.study.file.evaluation.samples)) for name in _secondary(record)],
        common_line=texts.common_line(record),
        tuning=texts.tuning_table(record) if record.tuning else None,
        common=texts.common_table(record),
        arms=texts.arms_table(record),
        method=texts.method_lines(record),
    )


def _bed(record: Record, rows: Rows, bed: str, runs: Sequence[RunMetrics]) -> Bed:
    own = [one for one in runs if one.run.bed == bed]
    return Bed(
        name=visible(bed),
        answers=[visible(line) for line in texts.answers(record, rows)[bed]],
        differences=_differences(record, rows[bed][record.study.file.endpoint]),
        endpoints=_endpoints(record, rows[bed][record.study.file.endpoint], bed),
        main=texts.main_table(record, rows, bed, runs),
        secondary=texts.secondary_table(record, rows, bed),
        contrasts=texts.contrasts_table(record, bed),
        passes=_passes(record, curves(record, bed)),
        learning=[(visible(title), _learning(record, own, *metric)) for title, metric in _metrics(own)],
    )


def _metrics(runs: Sequence[RunMetrics]) -> list[tuple[str, tuple[str, str]]]:
    return [(title, (metric, unit)) for metric, title, unit in shown_metrics(list(runs))]


def _secondary(record: Record) -> list[str]:
    return [name for name in record.study.file.secondary if name != record.study.file.endpoint]


def _differences(record: Record, rows: Mapping[str, Row]) -> Markup:
    """Every rival's difference from the control, best first, with each seed's as a point."""
    judged = {arm: row.difference for arm, row in rows.items() if row.difference is not None}
    ordered = [
        RangeRow(arm, d.value, d.low, d.high, list(d.seeds.values()), d.verdict)
        for arm, d in best_first(judged, record.study.lower_is_better)
    ]
    file = record.study.file
    label = f"difference of {file.endpoint} to {file.control}"
    return Markup(ranges_svg(label, label, ordered, 0.0, file.equivalence))


def _endpoints(record: Record, rows: Mapping[str, Row], bed: str) -> Markup:
    """Every arm's endpoint, with each seed's as a point; the line is the starting model's."""
    file = record.study.file
    found = [RangeRow(arm, row.mean, row.low, row.high, list(row.seeds.values())) for arm, row in rows.items()]
    start = start_value(record, bed, file.endpoint)
    label = file.endpoint + ("" if start is None else "; the dashed line is the starting model")
    return Markup(ranges_svg(file.endpoint, label, found, start))


def _passes(record: Record, found: Mapping[str, Curve]) -> list[Panel]:
    """pass@k of every rival beside the control's and the starting model's."""
    file = record.study.file
    series = {arm: Series(arm or START, curve.k, curve.mean, curve.low, curve.high) for arm, curve in found.items()}
    if file.control not in series:
        return []
    panels = []
    for index, arm in enumerate(arm for arm in record.study.rivals if arm in series):
        shown = _styled(series[file.control], series[arm], index, series.get(""))
        chart = Chart(arm, "completions k", "pass@k", shown, is_log_x=True, y_range=(0.0, 1.02))
        panels.append(Panel(visible(arm), Markup(svg(chart))))
    return panels


def _learning(record: Record, runs: Sequence[RunMetrics], metric: str, unit: str) -> list[Panel]:
    """The metric over the steps, of every rival beside the control's, all with the same axis."""
    found = {arm: learning_curve(arm, [one for one in runs if one.run.arm == arm], metric) for arm in record.study.arms}
    values = [
        value
        for one in found.values()
        for part in (one.y, one.low or (), one.high or ())
        for value in part
        if value == value
    ]
    if not values or not found[record.study.file.control].x:
        return []
    margin = 0.05 * (max(values) - min(values)) or 0.05
    range_ = (min(values) - margin, max(values) + margin)
    panels = []
    for index, arm in enumerate(record.study.rivals):
        shown = _styled(found[record.study.file.control], found[arm], index)
        chart = Chart(f"{arm}: {metric}", "step", unit, shown, y_range=range_)
        panels.append(Panel(visible(arm), Markup(svg(chart))))
    return panels


def _styled(control: Series, rival: Series, index: int, start: Series | None = None) -> list[Series]:
    """The series at the places whose colours are theirs; the others stay empty."""
    empty = Series("", [], [])
    places = [control, *([empty] * ARM_STYLES), start or empty]
    places[1 + index % ARM_STYLES] = rival
    return places


# ---- study.md ----------------------------------------------------------------------------------------------------


def markdown(record: Record, rows: Rows, runs: Sequence[RunMetrics]) -> str:
    """The answers and the tables."""
    parts = [f"# {record.title}", texts.setup_line(record) + " " + texts.endpoint_line(record)]
    if missing := texts.missing_line(record):
        parts.append(f"**{missing}**")
    for bed in record.study.beds:
        if len(record.study.beds) > 1:
            parts.append(f"## {bed}")
        parts.append("\n".join(f"- {line}" for line in texts.answers(record, rows)[bed]))
        parts.append(_as_markdown(texts.main_table(record, rows, bed, runs)))
        if record.study.file.contrasts:
            parts.append("Pairs of arms, by the endpoint; described, not tested:")
            parts.append(_as_markdown(texts.contrasts_table(record, bed)))
        secondary = texts.secondary_table(record, rows, bed)
        if len(secondary.header) > 1:
            parts.append(f"Other numbers: {record.study.file.control}'s own, and the differences of the others.")
            parts.append(_as_markdown(secondary))
    if record.tuning:
        parts += ["## Tuning", _as_markdown(texts.tuning_table(record))]
    parts += ["## Arms", texts.common_line(record), _as_markdown(texts.common_table(record))]
    parts += [_as_markdown(texts.arms_table(record))]
    parts += ["## How to read this", "\n".join(f"- {line}" for line in texts.method_lines(record))]
    return "\n\n".join(parts) + "\n"


def _as_markdown(table: Table) -> str:
    rows = [table.header, ["---", *("---:" for _ in table.header[1:])], *table.rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows)


def _cell(text: str) -> Any:
    return visible(text).replace("|", "\\|")
