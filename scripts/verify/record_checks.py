"""Checks of a study's record against the study that was registered. Each gives a line per fault, and reads no git."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from vdr_cli.config.load import computed_settings, config_hash
from vdr_cli.errors import VdrError
from vdr_cli.study.archive import ARCHIVE, KeptRun, archived_tasks, kept_config, kept_run
from vdr_cli.study.directory import study_tree
from vdr_cli.study.endpoints import first_success
from vdr_cli.study.load import Study
from vdr_cli.study.plan import Task, runs_of
from vdr_cli.study.record import RESULTS, Record, RunRecord

ROUNDING = 1e-6
"""Relative error of a number that an archive keeps as float32."""
ABSENT = "absent"

Change = tuple[Any, Any]
"""A value before, and after."""


def flat(tree: Any, name: str = "") -> dict[str, Any]:
    """Dotted keys to values: {"a": {"b": 1}} to {"a.b": 1}. Lists, and sections without a key, are values."""
    if not isinstance(tree, Mapping) or not tree:
        return {name: list(tree) if isinstance(tree, tuple) else tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{name}.{key}" if name else str(key))
    return found


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Change]:
    """Dotted key to its two values, where the trees differ."""
    old, new = flat(before), flat(after)
    pairs = {key: (old.get(key, ABSENT), new.get(key, ABSENT)) for key in [*old, *new]}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def study_faults(study: Study, found: Study, name: str) -> Iterator[str]:
    """The study that the record's file holds is the registered one."""
    for key, (registered, recorded) in changes(study_tree(study), study_tree(found)).items():
        yield f"{name}: {key} is {recorded}; registered is {registered}"


def seed_faults(study: Study, runs: Iterable[RunRecord], seeds: int) -> Iterator[str]:
    """The runs are those of the first registered seeds, each with every arm. seeds: how many were to run."""
    tasks = [run.task for run in runs]
    ran = len({task.seed for task in tasks} & set(study.file.seeds))
    whole = [task for task in runs_of(study) if task.seed in study.file.seeds[:ran]]
    known = set(runs_of(study))
    for task in dict.fromkeys(tasks):
        if task not in known:
            yield f"{task.name}: not a run of the registered study"
        elif task not in whole:
            yield f"{task.name}: an earlier seed has no runs"
    for task in whole:
        if task not in tasks:
            yield f"{task.name}: missing; every arm of a seed is published"
    if ran != seeds:
        yield f"runs of {ran} of {len(study.file.seeds)} seeds; {seeds} by the registration and its deviations"


# ---- tuning and settings -----------------------------------------------------------------------------------------


def taken_trials(study: Study, record: Record) -> dict[tuple[str, str], int]:
    """(bed, arm) to the trial that its tuning took."""
    return {(row["bed"], row["arm"]): row["trial"] for row in record.tuning if row["taken"]} if study.trials else {}


def tuning_faults(study: Study, record: Record) -> Iterator[str]:
    """Every trial has a value, the best was taken, and the runs have its settings."""
    best = min if study.lower_is_better else max
    for bed in study.beds if study.trials else ():
        for arm in study.arms:
            rows = [row for row in record.tuning if (row["bed"], row["arm"]) == (bed, arm)]
            if sorted(row["trial"] for row in rows) != list(range(study.trials)):
                yield f"{bed}/{arm}: {len(rows)} trials in study.json; registered are {study.trials}"
            elif [row["value"] for row in rows if row["taken"]] != [best(row["value"] for row in rows)]:
                yield f"{bed}/{arm}: its tuning did not take the best trial"
    if record.tuning and not study.trials:
        yield "study.json has a tuning; none is registered"
    taken = taken_trials(study, record)
    for run in record.runs:
        if run.trial != taken.get((run.bed, run.arm or "")):
            yield f"{run.task.name}: ran as trial {run.trial}; the tuning took {taken.get((run.bed, run.arm or ''))}"


def settings_faults(study: Study, record: Record, directory: Path) -> Iterator[str]:
    """Hash and archived settings of each run are those that the registered study gives it."""
    taken, seen, known = taken_trials(study, record), set[tuple[str, str]](), set(runs_of(study))
    for run in record.runs:
        if run.arm is None or run.seed is None or run.task not in known:
            continue
        config = study.config(run.bed, run.arm, run.seed, taken.get((run.bed, run.arm)))
        if run.settings != config_hash(config):
            yield f"{run.task.name}: settings {run.settings}; those registered are {config_hash(config)}"
        if (run.bed, run.arm) in seen:
            continue
        seen.add((run.bed, run.arm))
        try:
            found = changes(computed_settings(config), computed_settings(kept_config(directory, run.task)))
        except VdrError as error:
            yield f"{run.bed}/{run.arm}: {error}"
            continue
        for key, (registered, kept) in found.items():
            yield f"{run.bed}/{run.arm}: {key} is {kept} in configs/; registered is {registered}"


# ---- counts and metrics ------------------------------------------------------------------------------------------


def evaluation_faults(study: Study, record: Record) -> Iterator[str]:
    """Starting models and runs were measured on the registered prompts; `read_record` has checked their samples."""
    asked = study.file.evaluation
    for bed in study.beds:
        rows = record.rows.get(bed, [])
        if rows != list(range(asked.prompts or len(rows))):
            yield f"{bed}: measured on {len(rows)} rows which are not the first {asked.prompts or 'ones'}"
        if bed not in [run.bed for run in record.starts]:
            yield f"{bed}: the starting model's counts are missing"


def length_faults(study: Study, run: RunRecord, kept: KeptRun) -> Iterator[str]:
    """The run and its metrics go to the end of the budget, and agree about what the run's counts say of it."""
    name, logged = run.task.name, sorted(kept.metrics.get("reward", {}))
    end = study.file.budget.steps or run.steps
    updates = study.config(run.bed, run.arm or "", run.seed or 0).grpo.updates_per_rollout
    if run.steps != end:
        yield f"{name}: {run.steps} steps; the budget is {end}"
    if logged != list(range(updates, end + 1, updates)):
        yield f"{name}: metrics.parquet has {len(logged)} of {end // updates} steps"
        return
    tokens = kept.metrics.get("sampled_tokens", {}).get(end, 0.0)
    if not math.isclose(tokens, run.tokens, rel_tol=ROUNDING):
        yield f"{name}: {run.tokens} sampled tokens; {tokens:.0f} by metrics.parquet"
    solved = [{"step": float(step), "solved": value} for step, value in sorted(kept.metrics.get("solved", {}).items())]
    first = first_success(solved)
    if run.first_success != first and not (math.isnan(first) and math.isnan(run.first_success)):
        yield f"{name}: first success at step {run.first_success:g}; {first:g} by metrics.parquet"


def twin_faults(runs: Iterable[tuple[RunRecord, KeptRun]]) -> Iterator[str]:
    """No two seeds of an arm have the same counts or rewards.

    Seeds that end where nothing is ever solved have the same counts, all zero; their rewards on the way there differ.
    """
    seen: dict[Hashable, RunRecord] = {}
    for run, kept in runs:
        counts = ("counts", run.bed, run.arm, tuple(run.solved))
        rewards = ("rewards", run.bed, run.arm, tuple(sorted(kept.metrics.get("reward", {}).items())))
        for key in [counts, rewards] if any(run.solved) else [rewards]:
            if seen.setdefault(key, run) is not run:
                yield f"{run.task.name}: the same {key[0]} as seed {seen[key].seed}"


def date_faults(starts: Mapping[Task, datetime], promised: datetime, published: datetime) -> Iterator[str]:
    """Each run started after its registration and before its publication."""
    for task, started in starts.items():
        if started <= promised:
            yield f"{task.name}: started {started}, before the commit of {promised}"
        if started > published:
            yield f"{task.name}: started {started}, after its publication at {published}"


Kept = list[tuple[RunRecord, KeptRun]]


def kept_runs(study: Study, record: Record, directory: Path) -> tuple[Kept, list[str]]:
    """The record's registered runs and their parts of metrics.parquet; and a line for each run that one file lacks."""
    kept, found, known = Kept(), list[str](), set(runs_of(study))
    for run in record.runs:
        try:
            if run.task in known:
                kept.append((run, kept_run(directory, run.task)))
        except VdrError as error:
            found.append(f"{run.task.name}: {error}")
    extra = archived_tasks(directory) - {run.task for run in record.runs}
    return kept, found + [f"{name}: in {ARCHIVE} and not in {RESULTS}" for name in sorted(task.name for task in extra)]
