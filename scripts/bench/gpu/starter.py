"""The starter end to end, as a user types it: train, eval beside the start, score.

Two short runs of the same settings must give the same metrics, times aside.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import SCRIPTS, device_of, parser_of, write_result

NOT_COMPARED = ("time", "tokens_per_second", "mfu")
"""Parts of the names of metrics that depend on the clock."""


def vdr(*arguments: object) -> float:
    """Seconds of one vdr command. SystemExit with its output if it fails."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "vdr_cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=SCRIPTS.parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"vdr {' '.join(command[3:])}: exit {done.returncode}\n{done.stdout[-1500:]}{done.stderr[-3000:]}"
        )
    return time.perf_counter() - began


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers_of(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not any(part in name for part in NOT_COMPARED)}


def first_difference(one: Path, other: Path) -> str | None:
    for a, b in zip(metrics_of(one), metrics_of(other), strict=True):
        for name, value in numbers_of(a).items():
            if value != b.get(name):
                return f"step {a.get('step')}: {name} {value} and {b.get(name)}"
    return None


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], required=True)
    args = parser.parse_args()
    device_of(args.toy)
    steps, short_steps = (2, 2) if args.toy else (120, 10)
    run, one, other = (args.work / f"starter-{args.dtype}-{name}" for name in ("run", "one", "other"))
    one = run if steps == short_steps else one
    runs = {run: steps, one: short_steps, other: short_steps}

    def train(output: Path, count: int) -> float:
        settings = [f"model.dtype={args.dtype}", "observe.live=off", "observe.report=false"]
        sets = [word for setting in settings for word in ("--set", setting)]
        return vdr("train", "--steps", count, "--output", output, *sets)

    with ThreadPoolExecutor(3) as pool:
        trained, *_ = pool.map(train, runs, runs.values())
    table, scores = args.work / f"eval-{args.dtype}.json", args.work / f"scores-{args.dtype}.parquet"
    evaluated = vdr("eval", "starter", run, "--json", table, *(["--prompts", 8] if args.toy else []))
    scored = vdr("score", run, "--model", run, "-o", scores)
    lines = [line for line in metrics_of(run) if "loss" in line]
    difference = first_difference(one, other)
    write_result(
        args.json,
        {
            "ok": difference is None,
            "seconds": {"train": trained, "eval": evaluated, "score": scored},
            "evaluated": [
                model | {"model": name}
                for name, model in zip(("start", "trained"), json.loads(table.read_text())["models"], strict=True)
            ],
            "first_line": lines[0],
            "last_line": lines[-1],
            "first_difference_between_runs": difference,
            "headlines": [
                f"train {steps} steps {trained:.0f} s, eval {evaluated:.0f} s, score {scored:.0f} s",
                f"reward {lines[0]['reward']:.3f} -> {lines[-1]['reward']:.3f}, step {lines[-1]['step_time']:.2f} s",
                f"two runs of {short_steps} steps: {difference or 'the same numbers'}",
            ],
        },
    )


if __name__ == "__main__":
    main()
