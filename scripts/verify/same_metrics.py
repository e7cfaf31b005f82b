#!/usr/bin/env python3
"""Check that two checkouts train alike: metrics.jsonl of the starter, equal to the last bit, times and speeds aside.

    scripts/verify/same_metrics.py OLD/.venv/bin/python NEW/.venv/bin/python [--steps 4] [--rename OLD=NEW ...]

Each Python runs the vdr_cli that it imports. Every mode runs with one process and with two, at a fixed seed, with
held-out evaluations. Prints a row per run; exit code 1 when any value differs or a run fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MODES = ("end_of_sequence", "per_token", "none")
PROCESSES = (1, 2)
TIMES = ("time/", "step_time", "tokens_per_second", "step_time_share/", "mfu/")
"""Beginnings of the names of metrics that measure the machine."""
SMALL = (
    "--set", "train.prompts_per_step=4", "--group-size", "4", "--set", "train.eval_every=2",
    "--set", "train.eval_prompts=16", "--set", "train.checkpoint_every=0", "--set", "train.save_model=false",
    "--set", "observe.tensorboard=false", "--set", "observe.report=false", "--set", "observe.completions_every=0",
)  # fmt: skip

Steps = list[dict[str, Any]]


def main() -> int:
    """0 when all runs are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="Python of the checkout before")
    parser.add_argument("new", type=Path, help="Python of the checkout after")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rename", action="append", default=[], metavar="OLD=NEW", help="a metric's two names")
    given = parser.parse_args()
    renamed = dict(pair.split("=", 1) for pair in given.rename)
    print("| mode | processes | steps | values compared | result |\n|---|---|---|---|---|", flush=True)
    equal = True
    for mode in MODES:
        for processes in PROCESSES:
            with tempfile.TemporaryDirectory() as scratch:
                old, new = (
                    metrics_of(python.absolute(), mode, processes, given.steps, Path(scratch, name))
                    for python, name in ((given.old, "old"), (given.new, "new"))
                )
            old = [{renamed.get(name, name): value for name, value in step.items()} for step in old]
            found = differences(old, new)
            equal = equal and not found and len(old) >= given.steps
            compared = sum(map(len, map(lasting, old)))
            print(f"| {mode} | {processes} | {len(old)} | {compared} | {'; '.join(found[:5]) or 'equal'} |", flush=True)
    return 0 if equal else 1


def metrics_of(python: Path, mode: str, processes: int, steps: int, folder: Path) -> Steps:
    """The lines of metrics.jsonl of one run, from a directory that holds no vdr_cli."""
    folder.mkdir()
    command = [
        str(python), "-m", "vdr_cli", "train", "--mode", mode, "--steps", str(steps), "--seed", "3",
        "--output", "run", "--num-processes", str(processes), *SMALL,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"{' '.join(command)}: exit code {ended.returncode}\n{ended.stderr[-2000:]}")
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def lasting(step: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics that the machine's speed does not change."""
    return {name: value for name, value in step.items() if not name.startswith(TIMES)}


def differences(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each value that differs, and for a different number of steps."""
    found = [] if len(old) == len(new) else [f"{len(old)} steps, then {len(new)}"]
    for before, after in zip(map(lasting, old), map(lasting, new), strict=False):
        for name in sorted(before.keys() | after.keys()):
            first, second = before.get(name, "absent"), after.get(name, "absent")
            if first != second:
                found.append(f"step {before['step']} {name}: {first} / {second}")
    return found


if __name__ == "__main__":
    sys.exit(main())
