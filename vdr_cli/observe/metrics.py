"""Where the numbers of a run go: metrics.jsonl always, TensorBoard and Weights & Biases when asked.

metrics.jsonl holds one JSON object a line: {"step": 3, "reward": 0.5, ...}. A value that is not finite is
written as null (JSON has no NaN). A metric that was not measured at a step is absent.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vdr_cli.config.schema import ObserveConfig
from vdr_cli.errors import ConfigError, DataError, MachineError

METRICS_FILE = "metrics.jsonl"
SYNC_SECONDS = 1.0  # most work that a power cut can take from the file; a killed process loses nothing


class MetricsWriter:
    """Writes one step's metrics everywhere. One process (rank 0) owns it."""

    def __init__(self, run_dir: str | Path, settings: ObserveConfig, config: Mapping[str, Any] | None = None) -> None:
        """config: the resolved configuration, shown by Weights & Biases beside the curves."""
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / METRICS_FILE
        self._settings = settings
        self._purge_step: int | None = None
        self._synced_at = 0.0
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise MachineError(
                f"{self.run_dir}: cannot be written ({error.strerror}): choose another output"
            ) from error
        self._tensorboard: Any = None
        self._wandb = _start_wandb(self.run_dir, config) if settings.wandb else None

    def truncate(self, step: int) -> None:
        """Drop everything after this step: a resumed run writes it again. Atomic."""
        self._file.close()
        _keep_through(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")
        self._purge_step = step + 1

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line and send the same numbers to TensorBoard and Weights & Biases."""
        finite = {name: _finite(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()
        if time.monotonic() - self._synced_at > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced_at = time.monotonic()
        if self._settings.tensorboard:
            board = self._board()
            for name, value in metrics.items():
                board.add_scalar(name, float(value), step)
        if self._wandb is not None:
            self._wandb.log(dict(finite), step=step)

    def close(self) -> None:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _board(self) -> Any:
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.run_dir), purge_step=self._purge_step)
        return self._tensorboard


def read_metrics(path: str | Path) -> Iterator[dict[str, float]]:
    """The lines of a metrics.jsonl, null as NaN. A torn last line (a killed process) is left out."""
    path = Path(path)
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            record = _parse(line)
            if record is None and line.endswith("\n"):
                raise DataError(f"{path}:{number}: not a line of metrics: {line[:60]!r}")
            if record is not None:
                yield {name: math.nan if value is None else value for name, value in record.items()}


def _finite(value: float) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _keep_through(path: Path, step: int) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with path.open(encoding="utf-8") as lines, temporary.open("w", encoding="utf-8") as kept:
        for line in lines:
            record = _parse(line)
            if record is not None and record["step"] <= step and line.endswith("\n"):
                kept.write(line)
        kept.flush()
        os.fsync(kept.fileno())
    temporary.replace(path)


def _start_wandb(run_dir: Path, config: Mapping[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError("observe.wandb is on but wandb is not installed: pip install 'vdr-cli[wandb]'") from None
    identity = run_dir / "wandb_id"
    run_id = identity.read_text().strip() if identity.exists() else wandb.util.generate_id()
    identity.write_text(run_id + "\n")
    return wandb.init(
        project="vdr", name=run_dir.name, dir=str(run_dir), id=run_id, resume="allow", config=dict(config or {})
    )
