"""A run's files: settings, metrics, and the audit records that training wrote for this."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vdr_cli.config import Config
from vdr_cli.config.load import load_config
from vdr_cli.errors import ConfigError, DataError

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

STATE = b"vdr_audit"
"""Key of the step's own numbers in the Parquet file's metadata, as JSON."""


@dataclass(frozen=True)
class Record:
    """One step's completions, over all ranks in the order of the stream, with what was made of them."""

    step: int
    """Optimizer steps done before it."""
    state: dict[str, Any]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.columns["row"])

    def numbers(self, name: str) -> Array:
        """(B,) float64; NaN where there is none."""
        return np.array([math.nan if value is None else value for value in self.columns[name]], dtype=np.float64)

    def tokens(self, name: str) -> Array:
        """(B, T) float64 from lists of unequal length, 0 beyond each one's end."""
        found = np.zeros(self.mask.shape)
        for row, values in enumerate(self.columns[name]):
            found[row, : len(values)] = [math.nan if value is None else value for value in values]
        return found

    def has(self, name: str) -> bool:
        """True if every row has this column."""
        return name in self.columns and all(value is not None for value in self.columns[name])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(B,) tokens of each completion, an environment's included."""
        return np.array([len(ids) for ids in self.columns["completion_ids"]], dtype=np.int64)

    @cached_property
    def mask(self) -> Flags:
        """(B, T) valid tokens."""
        widest = max(int(self.lengths.max(initial=0)), 1)
        return np.arange(widest)[None] < self.lengths[:, None]

    @cached_property
    def policy(self) -> Flags:
        """(B, T) valid tokens that the policy sampled; the others are an environment's."""
        found = self.mask.copy()
        for row, flags in enumerate(self.columns.get("policy", [])):
            if flags is not None:
                found[row, : len(flags)] = flags
        return found

    @cached_property
    def truncated(self) -> Flags:
        return np.array(self.columns["truncated"], dtype=bool)

    @cached_property
    def rewards(self) -> Array:
        """(B, F), NaN where a function returned None."""
        rows = [[math.nan if value is None else value for value in row] for row in self.columns["rewards"]]
        return np.array(rows, dtype=np.float64).reshape(len(self), -1)

    def decoded(self, name: str) -> list[Any]:
        """A column of JSON texts."""
        return [json.loads(text) for text in self.columns[name]]


@dataclass(frozen=True)
class RunFiles:
    """A run directory."""

    path: Path
    config: Config
    metrics: dict[int, dict[str, float]]
    """By step, as metrics.jsonl counts: the steps done after the update."""

    @property
    def has_ended(self) -> bool:
        """False for a run that was resumed, and interrupted or killed since."""
        return (self.path / "finished.json").is_file()

    @property
    def steps(self) -> list[int]:
        """The steps that have an audit record."""
        return self._numbers("step")

    @property
    def evaluations(self) -> list[int]:
        """The steps after which an evaluation left a record."""
        return self._numbers("eval")

    def _numbers(self, kind: str) -> list[int]:
        files = (self.path / "audit").glob(f"{kind}_*.parquet")
        numbers = [file.stem.removeprefix(f"{kind}_") for file in files]
        return sorted(int(number) for number in numbers if number.isdecimal())

    def record(self, step: int, kind: Literal["step", "eval"] = "step") -> Record:
        """The record of one step, or of the evaluation after it. DataError when it cannot be read."""
        import pyarrow.parquet as pq

        file = self.path / "audit" / f"{kind}_{step:06d}.parquet"
        try:
            table = pq.read_table(file)
            state = json.loads((table.schema.metadata or {})[STATE])
            return Record(int(state["step"]), state, table.to_pydict())
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise DataError(f"{file}: not an audit record ({reason}); train again with observe.audit_every") from error

    def completions(self, step: int) -> dict[str, list[Any]] | None:
        """The columns of completions/ for the rollout that ended at this step; None: not saved."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = self.path / "completions" / f"step_{step:06d}.parquet"
        if not file.is_file():
            return None
        try:
            return dict(pq.read_table(file).to_pydict())
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file}: not a Parquet file of completions: {error}") from error

    def checkpoint(self, step: int) -> Path | None:
        """The checkpoint after this many steps; None: not kept."""
        path = self.path / "checkpoints" / f"step_{step:06d}"
        return path if path.is_dir() else None


def open_run(path: Path) -> RunFiles:
    """The files of a run. ConfigError when it is not a run's directory or has nothing to audit."""
    if not path.exists():
        raise ConfigError(f"{path}: no such run directory")
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path}: not a run directory: it has no config.yaml; give the --output of a vdr train")
    run = RunFiles(path, load_config(path / "config.yaml"), _metrics(path / "metrics.jsonl"))
    if not run.steps:
        raise ConfigError(
            f"{path}: nothing to audit: audit/ holds no step; train with observe.audit_every (0 turns it off)"
        )
    return run


def _metrics(file: Path) -> dict[int, dict[str, float]]:
    if not file.is_file():
        raise DataError(f"{file}: no such file; the run has no metrics to audit")
    found: dict[int, dict[str, float]] = {}
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            step = int(entry.pop("step"))
        except (ValueError, KeyError, AttributeError):
            if number == len(lines):
                continue  # a killed process's last line
            raise DataError(f"{file}:{number}: not a line of metrics") from None
        known = {name: math.nan if value is None else float(value) for name, value in entry.items()}
        found[step] = found.get(step, {}) | known
    return found
