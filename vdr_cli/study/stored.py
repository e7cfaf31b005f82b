"""The numbers that a study keeps in JSON: their types, checked whenever a file is read."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, WrapValidator

from vdr_cli.errors import DataError
from vdr_cli.study.endpoints import Measured
from vdr_cli.study.plan import Task
from vdr_cli.system.text import shown_value

RESTORE = "the file is damaged; restore it from a copy"

T = TypeVar("T")
Count = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Steps = Annotated[Number, Field(ge=0), WrapValidator(lambda value, check: math.nan if value is None else check(value))]
"""NaN, null in the file, stands for none."""


@dataclass(frozen=True)
class Counts:
    """evaluation.json: one value per prompt, as measure.py writes them."""

    request: str
    """Fingerprint of the evaluation's settings."""
    samples: Annotated[Count, Field(ge=1)]
    rows: list[Count]
    solved: list[Count]
    classes: list[Count]
    reward: list[Number]


@dataclass(frozen=True)
class RunRecord:
    """One run of record, or the starting model of a bed (no arm)."""

    bed: str
    samples: Annotated[Count, Field(ge=1)]
    solved: list[Count]
    classes: list[Count]
    reward: list[Number]
    arm: str | None = None
    seed: Count | None = None
    trial: Count | None = None
    """The tuned settings it ran with."""
    settings: str | None = None
    """Hash of everything that decides what it computes, from the run's own config.yaml."""
    steps: Count = 0
    tokens: Count = 0
    """Completion tokens sampled in training."""
    first_success: Steps = 0.0

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    @property
    def task(self) -> Task:
        """Its place among the study's directories."""
        return Task(self.bed, self.arm, self.seed)

    @property
    def measured(self) -> Measured:
        return Measured(
            self.samples, np.array(self.solved), np.array(self.classes), np.array(self.reward), self.first_success
        )


@dataclass(frozen=True)
class TrialRecord:
    """The result of one trial of the tuning."""

    bed: str
    arm: str
    trial: Count
    value: Number | None
    """Mean endpoint over its seeds."""
    taken: Annotated[bool, Field(strict=True)]


@dataclass(frozen=True)
class Stored:
    """The parts of study.json that are read. Its results are not: they are computed again."""

    title: str
    study: dict[str, Any]
    rows: dict[str, list[Count]]
    starts: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    tuning: list[TrialRecord]


class _PerPrompt(Protocol):
    """Counts or RunRecord."""

    @property
    def samples(self) -> int: ...
    @property
    def solved(self) -> list[int]: ...
    @property
    def classes(self) -> list[int]: ...
    @property
    def reward(self) -> list[float]: ...


COUNTS, RUN, STORED = TypeAdapter(Counts), TypeAdapter(RunRecord), TypeAdapter(Stored)
RUN_KEYS = [item.name for item in fields(RunRecord)]


def read_counts(path: Path) -> dict[str, Any] | None:
    """The counts that measure.py wrote; None where there are none, or damaged ones, which are measured again."""
    try:
        found = COUNTS.validate_python(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None
    return None if counts_fault(found, len(found.rows)) else asdict(found)


def run_from(row: dict[str, Any], where: str) -> RunRecord:
    """A run from its line in study.json. where: begins the error. Raises DataError for a wrong key or type."""
    named = f"{where} ({row.get('bed')}/{row.get('arm')} seed {row.get('seed')})"
    if missing := [name for name in RUN_KEYS if name not in row]:
        raise DataError(f"{named}: {missing[0]} is missing; {RESTORE}")
    return parsed(RUN, row, named)


def parsed(adapter: TypeAdapter[T], value: Any, where: str) -> T:
    """The value as the adapter's type. Raises DataError, one line that names the key, for one that is not."""
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise DataError(f"{where}: {_problem(error)}; {RESTORE}") from None


def _problem(error: ValidationError) -> str:
    """The first problem: `solved[3] must be a valid integer, not 1.5`."""
    first = error.errors(include_url=False)[0]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "unexpected_keyword_argument":
        return f"{key} is not a key of a run"
    return f"{key} {first['msg'].replace('Input should be', 'must be')}, not {shown_value(first['input'])}"


def counts_fault(counts: _PerPrompt, prompts: int) -> str:
    """The first contradiction in the counts of a model on this many prompts; empty without one."""
    for key in ("solved", "classes", "reward"):
        if len(getattr(counts, key)) != prompts:
            return f"{key} has {len(getattr(counts, key))} values for {prompts} prompts (rows)"
    for key in ("solved", "classes"):
        for index, value in enumerate(getattr(counts, key)):
            if value > counts.samples:
                return f"{key}[{index}] is {value}, of {counts.samples} completions"
    return ""
