"""A study kept small: one table in place of its run directories.

    study.yaml study.json study.md study.html
    metrics.parquet          run by run, step by step: bed, arm, seed, started (UTC), step, and the metrics that matter
                             (float32)
    configs/BED-ARM.yaml     the settings of the arm's first run; the others differ in train.seed

`vdr study report` and `vdr study --resume` take an archive for the study itself: it can be published, and gone on with
on another machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vdr_cli.config.load import load_config
from vdr_cli.config.schema import Config
from vdr_cli.data.metrics import METRICS_FILE, read_metrics
from vdr_cli.errors import DataError
from vdr_cli.study.plan import Task

ARCHIVE = "metrics.parquet"
CONFIGS, CONFIG = "configs", "config.yaml"
KEPT = frozenset({
    "reward", "solved", "entropy", "frac_reward_zero_std", "completions/mean_length", "completions/distinct", "kl",
    "loss", "grad_norm", "step_time", "sampled_tokens",
})  # fmt: skip
KEPT_SECTIONS = ("eval/", "bonus/", "disagreement/")
"""Metrics of an archive: these names, and all in these sections."""


def _is_name(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind.value_type if pa.types.is_dictionary(kind) else kind)


KEYS: Mapping[str, Callable[[pa.DataType], bool]] = {
    "bed": _is_name,
    "arm": _is_name,
    "seed": pa.types.is_integer,
    "started": lambda kind: pa.types.is_timestamp(kind) and kind.tz is not None,
    "step": pa.types.is_integer,
}
"""Column to the test of its type; the others are metrics, numbers all."""

Metrics = dict[str, dict[int, float]]
"""Name to step to value."""


@dataclass(frozen=True)
class KeptRun:
    """The part of a run that an archive keeps beside its counts."""

    started: datetime
    metrics: Metrics


def kept_run(directory: Path, task: Task) -> KeptRun:
    """The run's metrics and its start, from its directory or the archive. Raises DataError when they are gone."""
    run = directory / task.path
    archived = _archived(directory)
    if task in archived and not (run / METRICS_FILE).is_file():
        return archived[task]
    if is_archive(directory) and not run.is_dir():
        state = f"no metrics of {task.name} in it" if (directory / ARCHIVE).is_file() else "missing"
        raise DataError(f"{directory / ARCHIVE}: {state}; restore the file from a copy")
    metrics = _by_name(metrics_file(directory, task))
    seconds = int(next(path for path in (run / CONFIG, run) if path.exists()).stat().st_mtime)
    return KeptRun(datetime.fromtimestamp(seconds, UTC), metrics)


def is_archive(directory: Path) -> bool:
    """True for an archive, whole or not."""
    return (directory / ARCHIVE).is_file() or (directory / CONFIGS).is_dir()


def metrics_file(directory: Path, task: Task) -> Path:
    """The run's metrics.jsonl. Raises DataError when it is gone."""
    path = directory / task.path / METRICS_FILE
    if not path.is_file():
        raise DataError(f"{path}: missing; the report of a study needs the metrics of each of its runs")
    return path


def run_config(directory: Path, task: Task) -> Config:
    """The settings that a run had, from its directory. Raises ConfigError, DataError."""
    path = directory / task.path / CONFIG
    if not path.is_file():
        raise DataError(f"{path}: missing; remove the run's directory, and run it again with --resume")
    return load_config(path)


def archived_tasks(directory: Path) -> frozenset[Task]:
    """The runs whose metrics the directory's archive has; none without an archive."""
    return frozenset(_archived(directory))


def name_of(task: Task) -> str:
    """The file of the arm's settings on this bed."""
    return f"{task.bed}-{task.arm}"


def settings_text(directory: Path, task: Task) -> str:
    """The settings of a run, or of its arm's first run in the archive: YAML. Raises DataError where there are none."""
    run, kept = directory / task.path / CONFIG, directory / CONFIGS / f"{name_of(task)}.yaml"
    path = kept if kept.is_file() and not run.is_file() else run
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def kept_config(directory: Path, task: Task) -> Config:
    """The settings of an archived run. Raises ConfigError, DataError."""
    if not (directory / CONFIGS / f"{name_of(task)}.yaml").is_file():
        raise DataError(f"{directory / CONFIGS / name_of(task)}.yaml: missing; the archive is not whole")
    config = load_config(directory / CONFIGS / f"{name_of(task)}.yaml")
    return config.model_copy(update={"train": config.train.model_copy(update={"seed": task.seed})})


def write_archive(runs: Mapping[Task, KeptRun], configs: Mapping[str, str], directory: Path) -> None:
    """Write the metrics and the settings. configs: BED-ARM to YAML. Raises OSError."""
    (directory / CONFIGS).mkdir(parents=True)
    for name, text in configs.items():
        (directory / CONFIGS / f"{name}.yaml").write_text(text, encoding="utf-8")
    pq.write_table(_table(runs), directory / ARCHIVE, compression="zstd", compression_level=19)


def _table(runs: Mapping[Task, KeptRun]) -> pa.Table:
    rows = [(task, step) for task, run in runs.items() for step in sorted(set().union(*run.metrics.values()))]
    names = sorted({name for run in runs.values() for name in run.metrics if _is_kept(name)})
    columns = {
        "bed": pa.array([task.bed for task, _ in rows]).dictionary_encode(),
        "arm": pa.array([task.arm for task, _ in rows]).dictionary_encode(),
        "seed": pa.array([task.seed for task, _ in rows], pa.int64()),
        "started": pa.array([runs[task].started for task, _ in rows], pa.timestamp("s", "UTC")),
        "step": pa.array([step for _, step in rows], pa.int32()),
    }
    for name in names:
        values = [runs[task].metrics.get(name, {}).get(step) for task, step in rows]
        columns[name] = pa.array(values, pa.float32())
    return pa.table(columns)


def _is_kept(name: str) -> bool:
    return name in KEPT or name.startswith(KEPT_SECTIONS)


def _by_name(path: Path) -> Metrics:
    found: Metrics = {}
    for line in read_metrics(path):
        for name, value in line.items():
            if name != "step" and math.isfinite(value):
                found.setdefault(name, {})[int(line["step"])] = value
    return found


def _archived(directory: Path) -> dict[Task, KeptRun]:
    path = directory / ARCHIVE
    return _read(path, path.stat().st_mtime_ns) if path.is_file() else {}


@lru_cache(maxsize=8)
def _read(path: Path, stamp: int) -> dict[Task, KeptRun]:
    """The runs of an archive. stamp: when it was written, so that a newer one is read."""
    try:
        table = pq.read_table(path)
        _check_columns(table)
        keys = [table[name].to_pylist() for name in KEYS]
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as the metrics of a study ({' '.join(str(error).split())})") from None
    rows = [(Task(bed, arm, seed), step) for bed, arm, seed, _, step in zip(*keys, strict=True)]
    found = {task: KeptRun(started, {}) for (task, _), started in zip(rows, keys[3], strict=True)}
    for name in table.column_names:
        if name not in KEYS:
            for (task, step), value in zip(rows, table[name].to_pylist(), strict=True):
                if value is not None and math.isfinite(value):
                    found[task].metrics.setdefault(name, {})[step] = value
    return found


def _check_columns(table: pa.Table) -> None:
    """Raise ValueError for a column of another type than `_table` writes, or a key that is null."""
    for column in table.schema:
        is_right = KEYS.get(column.name, pa.types.is_floating)
        if not is_right(column.type):
            raise ValueError(f"column {column.name} holds {column.type}")
    for name in KEYS:
        if table[name].null_count:
            raise ValueError(f"column {name} has rows without a value")
