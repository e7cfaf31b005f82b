"""The last lines of a run: what it made, what improved, and which commands come next."""

from __future__ import annotations

import shlex
from pathlib import Path

from vdr_cli.config.schema import Config
from vdr_cli.data.metrics import METRICS_FILE, read_metrics
from vdr_cli.errors import DataError
from vdr_cli.exploration.collapse import warnings_of
from vdr_cli.system.text import listed

HELD_OUT = "eval/pass@1"


def closing_lines(directory: Path, config: Config) -> list[str]:
    """A few lines for the user of a run that reached its end; early warnings are repeated, with their steps."""
    made = [name for name in ("model/", "adapter/", "report.html") if (directory / name).exists()]
    lines = [f"finished: {listed(made) or 'the last checkpoint'} in {directory}"]
    metrics = _metrics(directory)
    if (improved := _improvement(metrics)) is not None:
        lines.append(improved)
    lines += [f"warned at step {step}: {warning}" for step, warning in warnings_of(config, metrics)]
    if (directory / "model").is_dir():
        start, run = shlex.quote(config.model.name), shlex.quote(str(directory))
        lines.append(f"next: vdr eval {start} {run}; vdr score {run} --model {run}; vdr audit {run}")
    return lines


def _metrics(directory: Path) -> list[dict[str, float]]:
    """The run's lines; none where they cannot be read: a full disk may have cost some, and the run is done anyway."""
    try:
        return list(read_metrics(directory / METRICS_FILE))
    except (OSError, DataError):
        return []


def _improvement(lines: list[dict[str, float]]) -> str | None:
    """Held-out pass@1 of the first and last evaluation; without evaluations, the reward of the first and last step."""
    for name, words in ((HELD_OUT, "held-out pass@1"), ("reward", "reward")):
        found = [(int(line["step"]), float(line[name])) for line in lines if name in line]
        if len(found) > 1:
            (first, before), (last, after) = found[0], found[-1]
            return f"{words} {before:.3f} at step {first}, {after:.3f} at step {last}"
    return None
