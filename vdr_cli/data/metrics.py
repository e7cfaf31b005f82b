"""The file metrics.jsonl of a run: one JSON object per line, {"step": 3, "reward": 0.5, ...}.

A value that is not finite is written as null (JSON has no NaN). A metric that was not measured at a step is absent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vdr_cli.errors import DataError

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: str | Path) -> Iterator[dict[str, float]]:
    """The lines of a metrics.jsonl, null as NaN. A torn last line (a killed process) is left out."""
    path = Path(path)
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            record = parse_line(line)
            if record is None and line.endswith("\n"):
                raise DataError(f"{path}:{number}: not a line of metrics: {line[:60]!r}")
            if record is not None:
                yield {name: math.nan if value is None else value for name, value in record.items()}


def parse_line(line: str) -> dict[str, Any] | None:
    """One line's numbers; None when the line is torn or not one of metrics."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return record if all(value is None or isinstance(value, int | float) for value in record.values()) else None
