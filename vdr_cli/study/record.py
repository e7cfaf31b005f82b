"""study.json: the study, the counts of every run, and the results. Everything but the curves comes from this file.

Times are not in it: they are read from the runs' metrics, so two executions of a study have the same study.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vdr_cli.config.load import config_hash
from vdr_cli.data.metrics import METRICS_FILE, read_metrics
from vdr_cli.errors import ConfigError, DataError, VdrError
from vdr_cli.study.archive import ARCHIVE, archived_tasks, metrics_file, run_config
from vdr_cli.study.directory import STUDY_FILE, StudyDirectory, study_tree
from vdr_cli.study.endpoints import Measured, first_success, value_of
from vdr_cli.study.load import Study, check_structure, study_of
from vdr_cli.study.plan import Task, runs_of, trials_of
from vdr_cli.study.stored import RESTORE, STORED, RunRecord, counts_fault, parsed, read_counts, run_from

RESULTS = "study.json"
FORMAT = 1
DIGITS = 8
"""Significant digits of results: fewer than rounding on another machine could change."""


@dataclass(frozen=True)
class Record:
    """A study and the counts of its runs."""

    title: str
    study: Study
    rows: dict[str, list[int]]
    """Bed to its held-out rows, in order."""
    starts: list[RunRecord]
    runs: list[RunRecord]
    tuning: list[dict[str, Any]] = field(default_factory=list)
    """A trial: bed, arm, trial, the mean endpoint over its seeds, and whether it was taken."""

    def start(self, bed: str) -> Measured | None:
        """Counts of the bed's starting model; None where it has not been measured."""
        return next((run.measured for run in self.starts if run.bed == bed), None)

    def of(self, bed: str, arm: str) -> dict[int, RunRecord]:
        """Seed to run."""
        return {run.seed: run for run in self.runs if (run.bed, run.arm) == (bed, arm) and run.seed is not None}


def record_of(study: Study, directory: StudyDirectory) -> Record:
    """The runs that the directory and its archive hold so far.

    Raises DataError when runs were measured on other prompts, or lack their settings or metrics.
    """
    kept = archived_record(directory.path)
    rows: dict[str, list[int]] = dict(kept.rows) if kept else {}
    archived = {run.task: run for run in (*kept.starts, *kept.runs)} if kept else {}
    starts: list[RunRecord] = []
    runs: list[RunRecord] = []
    for task in [*(Task(bed) for bed in study.beds), *runs_of(study)]:
        counts = read_counts(directory.evaluation(task))
        if counts is None:
            if task in archived:
                (starts if task.is_start else runs).append(archived[task])
            continue
        if rows.setdefault(task.bed, counts["rows"]) != counts["rows"]:
            raise DataError(f"{directory.evaluation(task)}: measured on other prompts than the other runs; remove it")
        (starts if task.is_start else runs).append(_run_record(study, directory, task, counts))
    return Record(directory.path.absolute().name, study, rows, starts, runs, tuning_of(study, directory))


def unrecorded(record: Record, directory: StudyDirectory) -> list[str]:
    """Names of the runs and trials that are evaluated in the directory and not in the record."""
    study, known = record.study, {run.task for run in (*record.starts, *record.runs)}
    tasks = [task for task in [*(Task(bed) for bed in study.beds), *runs_of(study)] if task not in known]
    names = [task.name for task in tasks if read_counts(directory.evaluation(task)) is not None]
    tried = {(row["bed"], row["arm"], row["trial"]) for row in record.tuning}
    trials = [(row["bed"], row["arm"], row["trial"]) for row in tuning_of(study, directory)]
    return names + [f"{bed}/{arm} trial {trial + 1}" for bed, arm, trial in trials if (bed, arm, trial) not in tried]


def archived_record(directory: Path) -> Record | None:
    """The record of runs whose directories are gone: the archive's study.json, less runs that have no metrics there.

    None where there is no archive.
    """
    tasks = archived_tasks(directory)
    if not tasks:
        return None
    path = directory / RESULTS
    found = _read_record(directory, path.stat().st_mtime_ns if path.is_file() else 0)
    return replace(found, runs=[run for run in found.runs if run.task in tasks])


@lru_cache(maxsize=8)
def _read_record(directory: Path, stamp: int) -> Record:
    """read_record, once for each version of the file: a study that runs asks again and again."""
    return read_record(directory)


def _run_record(study: Study, directory: StudyDirectory, task: Task, counts: Mapping[str, Any]) -> RunRecord:
    kept = {name: counts[name] for name in ("samples", "solved", "classes", "reward")}
    if task.is_start or task.arm is None or task.seed is None:
        return RunRecord(task.bed, **kept)
    trial = chosen_trial(study, directory, task.bed, task.arm) if study.trials else None
    lines = [line for line in read_metrics(metrics_file(directory.path, task)) if "reward" in line]
    last = lines[-1] if lines else {}
    return RunRecord(
        task.bed,
        **kept,
        arm=task.arm,
        seed=task.seed,
        trial=trial,
        settings=config_hash(run_config(directory.path, task)),
        steps=int(last.get("step", 0)),
        tokens=int(last.get("sampled_tokens", 0)),
        first_success=first_success(lines),
    )


# ---- tuning ------------------------------------------------------------------------------------------------------


def chosen_trial(study: Study, directory: StudyDirectory, bed: str, arm: str) -> int | None:
    """The index of the arm's best settings on this bed, by the mean endpoint; the first of equals. None: not known."""
    values = [trial_value(study, directory, bed, arm, index) for index in range(study.trials)]
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    sign = -1.0 if study.lower_is_better else 1.0
    return max(range(len(known)), key=lambda index: sign * known[index])


def trial_value(study: Study, directory: StudyDirectory, bed: str, arm: str, index: int) -> float | None:
    """The mean endpoint over the seeds of one trial, from its runs or the archive; None while one is missing."""
    start = start_of(directory, bed)
    found = []
    for task in trials_of(study, bed, arm)[index]:
        counts = read_counts(directory.evaluation(task))
        if counts is None or (start is None and study.needs_start):
            return _archived_value(directory, bed, arm, index)
        found.append(value_of(study.file.endpoint, _measured(directory, task, counts), start))
    return float(np.mean([np.mean(value) for value in found]))


def start_of(directory: StudyDirectory, bed: str) -> Measured | None:
    """Counts of the bed's starting model, from its evaluation or the archive; None where there are none."""
    counts = read_counts(directory.evaluation(Task(bed)))
    if counts is not None:
        return _measured(directory, None, counts)
    kept = archived_record(directory.path)
    return kept.start(bed) if kept else None


def _archived_value(directory: StudyDirectory, bed: str, arm: str, index: int) -> float | None:
    kept = archived_record(directory.path)
    rows = kept.tuning if kept else []
    return next((row["value"] for row in rows if (row["bed"], row["arm"], row["trial"]) == (bed, arm, index)), None)


def tuning_of(study: Study, directory: StudyDirectory) -> list[dict[str, Any]]:
    """Every trial that has been evaluated, with its value."""
    rows = []
    for bed in study.beds if study.trials else ():
        for arm in study.arms:
            chosen = chosen_trial(study, directory, bed, arm)
            for index in range(study.trials):
                value = trial_value(study, directory, bed, arm, index)
                if value is not None:
                    row = {"bed": bed, "arm": arm, "trial": index, "value": rounded(value), "taken": index == chosen}
                    rows.append(row)
    return rows


def _measured(directory: StudyDirectory, task: Task | None, counts: Mapping[str, Any]) -> Measured:
    path = directory.run(task) / METRICS_FILE if task is not None else None
    success = first_success(read_metrics(path)) if path is not None and path.is_file() else math.nan
    return Measured(
        counts["samples"], np.array(counts["solved"]), np.array(counts["classes"]), np.array(counts["reward"]), success
    )


# ---- the file ----------------------------------------------------------------------------------------------------


def record_text(record: Record, results: Mapping[str, Any]) -> str:
    """study.json: a line per run, so that a difference between two files shows which one differs."""
    parts = {
        "format": json.dumps(FORMAT),
        "title": json.dumps(record.title),
        "study": json.dumps(study_tree(record.study), indent=1),
        "rows": json.dumps(record.rows),
        "starts": _lines([asdict(run) for run in record.starts]),
        "runs": _lines([asdict(run) for run in record.runs]),
        "tuning": _lines(record.tuning),
        "results": json.dumps(rounded(results), indent=1, allow_nan=False),
    }
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {text}" for name, text in parts.items()) + "\n}\n"


def _lines(rows: list[dict[str, Any]]) -> str:
    compact = [json.dumps(rounded(row), separators=(",", ":"), allow_nan=False) for row in rows]
    return "[\n" + ",\n".join(compact) + "\n]" if compact else "[]"


def read_record(directory: Path) -> Record:
    """The record in a directory's study.json. Raises ConfigError when there is none, DataError when it is damaged."""
    path = directory / RESULTS
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _no_results(directory) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise DataError(f"{path}: not the results of a study that this version of vdr can read")
    found = parsed(STORED, tree, str(path))
    starts = [run_from(row, f"{path}: starts[{index}]") for index, row in enumerate(found.starts)]
    runs = [run_from(row, f"{path}: runs[{index}]") for index, row in enumerate(found.runs)]
    tuning = [asdict(row) for row in found.tuning]
    record = Record(found.title, _stored_study(found.study, directory), found.rows, starts, runs, tuning)
    for fault in _faults(record):
        raise DataError(f"{path}: {fault}; {RESTORE}")
    return record


def _no_results(directory: Path) -> VdrError:
    if (directory / ARCHIVE).is_file():
        return DataError(f"{directory / RESULTS}: missing; the archive is not whole")
    if (directory / STUDY_FILE).is_file():
        return ConfigError(
            f"{directory}: the study in it has not ended, so there is no {RESULTS}; finish it with "
            "`vdr study STUDY.yaml --resume`"
        )
    return ConfigError(f"{directory}: no {RESULTS} in it; give the directory of a study that has run")


def _stored_study(tree: Mapping[str, Any], directory: Path) -> Study:
    """The study in study.json. Its settings are not checked: they were valid for the version of vdr that ran it."""
    try:
        study = study_of({**tree, "output": str(directory)}, f"{directory / RESULTS}: study")
        check_structure(study)
    except ConfigError as error:
        raise DataError(str(error)) from None
    return study


def _faults(record: Record) -> Iterator[str]:
    """Contradictions between the record's parts, with the run and the key."""
    study, asked = record.study, record.study.file.evaluation
    yield from (f"rows: {bed} is not a bed of the study" for bed in record.rows if bed not in study.beds)
    for section, runs, samples in (
        ("starts", record.starts, asked.start_samples),
        ("runs", record.runs, asked.samples),
    ):
        seen: set[Task] = set()
        for run in runs:
            fault = _place_fault(run, study, section == "starts")
            if not fault and run.samples != samples:
                fault = f"samples is {run.samples}, and the study asks for {samples}"
            if not fault and run.task in seen:
                fault = "is there twice"
            fault = fault or counts_fault(run, len(record.rows.get(run.bed, [])))
            if fault:
                yield f"{section}: {run.task.name}: {fault}"
            seen.add(run.task)
    for row in record.tuning:
        if row["bed"] not in study.beds or row["arm"] not in study.arms or row["trial"] >= study.trials:
            yield f"tuning: {row['bed']}/{row['arm']} trial {row['trial']}: not a trial of the study"


def _place_fault(run: RunRecord, study: Study, is_start: bool) -> str:
    """The first of bed, arm, seed and trial that the study does not have; empty when it has all."""
    if run.bed not in study.beds:
        return f"bed is {run.bed}; the study has {', '.join(study.beds)}"
    if is_start:
        given = [key for key in ("arm", "seed", "trial") if getattr(run, key) is not None]
        return f"{given[0]} is given, and a starting model has none" if given else ""
    if run.arm not in study.arms:
        return f"arm is {run.arm}; the study has {', '.join(study.arms)}"
    if run.seed not in study.file.seeds:
        return f"seed is {run.seed}, which is not one of the study's"
    if run.trial is not None and run.trial >= study.trials:
        return f"trial is {run.trial}; the study has {study.trials}"
    return ""


def rounded(value: Any) -> Any:
    """The same tree, floats at DIGITS significant digits, and None for those that are no number: JSON has none."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value
