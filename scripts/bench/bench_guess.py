"""The embedded game before and after training: games won, guesses and the time it took, for each seed.

    python scripts/bench/bench_guess.py --json benchmarks/guess.json [--seeds 0 1 2] [--steps N]

Trains with `vdr train --model guess` as it is, and with the disagreement bonus; every model plays the held-out games in
`vdr eval`. Seconds are those of the whole command: imports, steps, saving. Processor
seconds say what an idle machine needs; wall seconds what this one took, with whatever else ran on it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness import parser_of, write_results

ARMS = {"plain": [], "bonus": ["--set", "bonus.source=disagreement"]}
"""Settings beside the recipe's."""
NUMBERS = {"won": "pass@1", "guesses": "tool_calls", "entropy": "entropy"}
"""Columns of an evaluation, by the names they have here."""


def vdr(*arguments: str) -> dict[str, float]:
    """Run the command; its wall and processor seconds, its children's included. SystemExit when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "vdr_cli", *arguments]
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"vdr {' '.join(arguments)} failed:\n{said.read()[-3000:]}")
    return {"wall_seconds": time.monotonic() - begin, "cpu_seconds": used.ru_utime + used.ru_stime}


def trained(arm: str, seed: int, steps: int | None, folder: Path) -> tuple[Path, dict[str, float]]:
    """A run's directory, and its seconds."""
    output = folder / f"{arm}-{seed}"
    more = [] if steps is None else ["--steps", str(steps)]
    seconds = vdr("train", "--model", "guess", "--seed", str(seed), "--output", str(output), *ARMS[arm], *more)
    print(json.dumps({"arm": arm, "seed": seed, **seconds}), flush=True)
    return output, seconds


def evaluated(models: Sequence[str], samples: int, folder: Path) -> list[dict[str, float]]:
    """Games won, guesses and entropy of each model on the held-out games, with 95 % intervals."""
    table = folder / "eval.json"
    vdr("eval", *models, "--samples", str(samples), "--json", str(table))
    rows = json.loads(table.read_text())["models"]
    ends = ("", "_low", "_high")
    return [{name + end: row[column + end] for name, column in NUMBERS.items() for end in ends} for row in rows]


def over_seeds(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the seeds, and the longest time."""
    means = {name: statistics.mean(run[name] for run in runs) for name in NUMBERS}
    return means | {f"most_{name}": max(run[name] for run in runs) for name in ("wall_seconds", "cpu_seconds")}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--bonus-seeds", type=int, nargs="*", default=[0], help="of runs with the bonus")
    parser.add_argument("--samples", type=int, default=8, help="games of each held-out problem")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(arguments.jobs) as pool:
        folder = Path(name)
        plan = [*(("plain", seed) for seed in arguments.seeds), *(("bonus", seed) for seed in arguments.bonus_seeds)]
        runs = list(pool.map(lambda each: trained(*each, arguments.steps, folder), plan))
        start, *ends = evaluated(["guess", *(str(output) for output, _ in runs)], arguments.samples, folder)
        steps = len((runs[0][0] / "metrics.jsonl").read_text().splitlines())
    results: dict[str, Any] = {"steps": steps, "start": start}
    for arm in ARMS:
        of_arm = [
            {"seed": seed, **seconds, **end}
            for (each, seed), (_, seconds), end in zip(plan, runs, ends, strict=True)
            if each == arm
        ]
        results[arm] = {"runs": of_arm, **over_seeds(of_arm)}
    print(json.dumps(results, indent=1))
    write_results(arguments.json, results)


if __name__ == "__main__":
    main()
