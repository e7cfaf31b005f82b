"""The parts of a study in the order in which they run, and their directories. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vdr_cli.errors import ConfigError
from vdr_cli.study.load import Study

SHARD = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True)
class Task:
    """A run with its evaluation, or the evaluation of a bed's starting model (no arm)."""

    bed: str
    arm: str | None = None
    seed: int | None = None
    trial: int | None = None
    """Index of the settings tried; None: a run of record."""

    @property
    def is_start(self) -> bool:
        return self.arm is None

    @property
    def is_trial(self) -> bool:
        return self.trial is not None

    @property
    def name(self) -> str:
        """As a person reads it: `starter/noise seed 3`."""
        if self.arm is None:
            return f"{self.bed} start"
        tried = f" trial {self.trial + 1}" if self.trial is not None else ""
        return f"{self.bed}/{self.arm}{tried} seed {self.seed}"

    @property
    def path(self) -> Path:
        """The run directory, below the study's."""
        if self.arm is None:
            return Path("starts") / self.bed
        seed = f"seed_{self.seed:04d}"
        if self.trial is not None:
            return Path("tuning") / self.bed / self.arm / f"trial_{self.trial + 1}" / seed
        return Path("runs") / self.bed / self.arm / seed


def tasks_of(study: Study) -> list[Task]:
    """Everything, in the order in which it is started: a study that is cut short has whole seeds of every arm."""
    starts = [Task(bed) for bed in study.beds]
    tuning = study.file.tuning
    trials = [
        Task(bed, arm, seed, trial)
        for seed in (tuning.seeds if tuning else ())
        for trial in range(study.trials)
        for bed in study.beds
        for arm in study.arms
    ]
    return [*starts, *trials, *runs_of(study)]


def runs_of(study: Study) -> list[Task]:
    """The runs of record."""
    return [Task(bed, arm, seed) for seed in study.file.seeds for bed in study.beds for arm in study.arms]


def trials_of(study: Study, bed: str, arm: str) -> list[list[Task]]:
    """For each of the arm's tuned settings, its runs."""
    seeds = study.file.tuning.seeds if study.file.tuning else ()
    return [[Task(bed, arm, seed, trial) for seed in seeds] for trial in range(study.trials)]


def with_starts(study: Study, tasks: Sequence[Task]) -> list[Task]:
    """The tasks, preceded by the starting models that their tuning needs: those of other shards too."""
    if not (study.trials and study.needs_start):
        return list(tasks)
    starts = dict.fromkeys(Task(task.bed) for task in tasks)
    return [*(start for start in starts if start not in tasks), *tasks]


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of a study; the first is 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`2/8`. Raises ConfigError."""
        found = SHARD.fullmatch(text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ConfigError(f"--shard {text}: give I/N with I from 1 to N, such as 1/8")
        return cls(int(found[1]), int(found[2]))

    def of(self, tasks: Sequence[Task]) -> list[Task]:
        """This part's tasks.

        With tuning, an arm's trials and runs on a bed stay together: its runs wait for its trials. Without, tasks are
        dealt out one by one.
        """
        if not any(task.is_trial for task in tasks):
            return list(tasks[self.number - 1 :: self.count])
        together = list(dict.fromkeys((task.bed, task.arm) for task in tasks))
        own = set(together[self.number - 1 :: self.count])
        return [task for task in tasks if (task.bed, task.arm) in own]
