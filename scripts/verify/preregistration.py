"""Checks that the studies of record are those of docs/evidence/preregistration.md, and came after it.

    python scripts/verify/preregistration.py

For every docs/evidence/BED/record: each run started after the commits of the preregistration and of BED/study.yaml, and
each arm ran with the settings that this study file gives it (of the trial that the tuning took). Exit code 1 otherwise.
"""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from vdr_cli.config.load import computed_settings
from vdr_cli.study.archive import archived_tasks, kept_config, kept_run
from vdr_cli.study.load import load_study
from vdr_cli.study.record import read_record

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = ROOT / "docs" / "evidence"


def added(path: Path) -> datetime:
    """The date of the commit that added the file."""
    command = ["git", "log", "--diff-filter=A", "--follow", "--format=%ct", "--", str(path.relative_to(ROOT))]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    if not lines:
        sys.exit(f"{path}: no commit has added it")
    return datetime.fromtimestamp(int(lines[-1]), UTC)


def faults(bed: Path, registered: datetime) -> list[str]:
    """Everything that is not as registered, a line each."""
    study, record = load_study(bed / "study.yaml"), read_record(bed / "record")
    promised = max(registered, added(bed / "study.yaml"))
    runs = {run.task: run for run in record.runs}
    found = [
        f"{task.name}: in metrics.parquet and not in study.json" for task in archived_tasks(bed / "record") - set(runs)
    ]
    for task, run in runs.items():
        started = kept_run(bed / "record", task).started
        if started <= promised:
            found.append(f"{task.name}: started {started}, before the commit of {promised}")
        if task.arm is None or task.seed is None or task.arm not in study.arms or task.seed not in study.file.seeds:
            found.append(f"{task.name}: not a run of {bed / 'study.yaml'}")
        elif computed_settings(study.config(task.bed, task.arm, task.seed, run.trial)) != computed_settings(
            kept_config(bed / "record", task)
        ):
            found.append(f"{task.name}: ran with other settings than {bed / 'study.yaml'} gives it")
    return found


def main() -> None:
    registered = added(EVIDENCE / "preregistration.md")
    beds = sorted(path.parent for path in EVIDENCE.glob("*/record"))
    found = []
    for bed in beds:
        wrong = faults(bed, registered)
        count = len(read_record(bed / "record").runs)
        print(f"{bed.name}: {count} runs of record, {len(wrong)} not as registered on {registered:%Y-%m-%d %H:%M} UTC")
        found += wrong
    print("\n".join(found) or "Every run is as registered.")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
