"""Writers of a run's numbers: metrics.jsonl always, TensorBoard and Weights & Biases when asked."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vdr_cli.config.schema import ObserveConfig
from vdr_cli.data.metrics import METRICS_FILE, parse_line
from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.system.files import replacing, write_whole
from vdr_cli.system.text import reason

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
        self._pending = b""
        self._board_lost = False
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise MachineError(
                f"{self.run_dir}: cannot be written ({error.strerror}): choose another output"
            ) from error
        self._tensorboard: Any = None
        self._wandb = _start_wandb(self.run_dir, config) if settings.wandb else None

    def truncate(self, step: int) -> None:
        """Drop everything after this step: a resumed run writes it again. Atomic."""
        self._rewrite(step, {})
        self._purge_step = step + 1

    def amend(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add numbers to the line of this step, the newest one, and send them on as `log` does. Atomic.

        Raises MachineError on a full disk; the line is as it was.
        """
        try:
            self._rewrite(step, _all_finite(metrics))
        except OSError as error:
            raise self._cannot_write(error) from error
        self._upload(step, metrics)
        self._draw(step, metrics)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line and send the same numbers to TensorBoard and Weights & Biases.

        Raises MachineError on a full disk; the line is kept and written before the next one.
        """
        self._pending += _line({"step": step, **_all_finite(metrics)}).encode()
        self._upload(step, metrics)
        try:
            self._write_pending()
        except OSError as error:
            raise self._cannot_write(error) from error
        self._draw(step, metrics)

    def close(self) -> None:
        """Write what is left; MachineError when that cannot be done."""
        try:
            if not self._file.closed:
                self._synced_at = 0.0
                self._write_pending()
                self._file.close()
            if self._tensorboard is not None:
                self._tensorboard.close()
        except OSError as error:
            raise MachineError(f"{self.path}: the last lines cannot be written: {error.strerror or error}") from error
        finally:
            self.finish_wandb()

    def finish_wandb(self) -> None:
        """Let Weights & Biases upload the rest and end its run, if there is one."""
        run, self._wandb = self._wandb, None
        if run is not None:
            run.finish()

    def _rewrite(self, step: int, added: Mapping[str, float | None]) -> None:
        self._file.close()
        try:
            _keep_through(self.path, step, added)
        finally:
            self._file = self.path.open("ab", buffering=0)

    def _cannot_write(self, error: OSError) -> MachineError:
        return MachineError(f"{self.run_dir}: metrics cannot be written: {error.strerror or error}")

    def _upload(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._wandb is not None:
            self._wandb.log(_all_finite(metrics), step=step)

    def _draw(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self._settings.tensorboard or self._board_lost:
            return
        board = self._board()
        try:
            for name, value in metrics.items():
                board.add_scalar(name, float(value), step)
        except OSError as error:  # its writing thread has ended
            self._board_lost, self._tensorboard = True, None
            raise MachineError(
                f"{self.run_dir}: TensorBoard events can no longer be written: {error.strerror or error}"
            ) from error

    def _write_pending(self) -> None:
        """Whole lines or nothing: a full disk takes part of a line, which is taken back."""
        length = os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            while written < len(self._pending):
                written += self._file.write(self._pending[written:]) or 0
        except OSError:
            os.ftruncate(self._file.fileno(), length)
            raise
        self._pending = b""
        if time.monotonic() - self._synced_at > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced_at = time.monotonic()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            self.close()
        except MachineError:
            if error is None:  # else the first error is the one to be told
                raise

    def _board(self) -> Any:
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.run_dir), purge_step=self._purge_step)
        return self._tensorboard


def _finite(value: float) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _all_finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in metrics.items()}


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _keep_through(path: Path, step: int, added: Mapping[str, float | None]) -> None:
    """Keep the whole lines up to this step. added: more numbers for the line of the step, which is made without one."""
    with (
        replacing(path) as partial,
        path.open(encoding="utf-8", errors="replace") as lines,
        partial.open("w", encoding="utf-8") as kept,
    ):
        for line in lines:
            record = parse_line(line)
            if record is None or record["step"] > step or not line.endswith("\n"):
                continue
            if record["step"] == step and added:
                line, added = _line({**record, **added}), {}
            kept.write(line)
        if added:
            kept.write(_line({"step": step, **added}))


def _start_wandb(run_dir: Path, config: Mapping[str, Any] | None) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError("observe.wandb is on but wandb is not installed: pip install wandb") from None
    identity = run_dir / "wandb_id"
    run_id = identity.read_text().strip() if identity.exists() else wandb.util.generate_id()
    write_whole(identity, run_id + "\n")
    try:
        return wandb.init(
            project="vdr", name=run_dir.name, dir=str(run_dir), id=run_id, resume="allow", config=dict(config or {})
        )
    except Exception as error:  # its own, and those of its network and its files
        raise MachineError(
            f"observe.wandb: Weights & Biases cannot be started ({reason(error)}); run `wandb login`, set "
            "WANDB_MODE=offline, or set observe.wandb to false"
        ) from error
