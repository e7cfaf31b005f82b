"""Every task of reasoning-gym through vdr's own path: rows, and what the reference answer scores.

    python scripts/verify/gym_tasks.py --rows 10 --json gym.json

For each task: held-out rows disjoint from training, the same rows in a second process with another hash seed, the
reference answer's score by the reward function that a run would call, and by the package itself. A reference that its
own verifier does not give 1 is named. Exit code 1 when anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vdr_cli.beds.gym import entry_of, generator, held_out_rows, suite_of, train_rows
from vdr_cli.config import RewardsConfig
from vdr_cli.errors import VdrError
from vdr_cli.rewards.calling import compute_rewards
from vdr_cli.rewards.loading import load_rewards
from vdr_cli.samples import Prompt

EVAL_ROWS = 2
MARK = "found: "
"""Begins a line of the second process."""


def tasks() -> list[str]:
    """Every task of the package."""
    import reasoning_gym

    return sorted(name for name in reasoning_gym.factory.DATASETS if name != "composite")


def checked(task: str, rows: int) -> dict[str, Any]:
    """Findings about a task's rows and reference answers; `error` when it has none."""
    start = time.monotonic()
    name = f"reasoning_gym:{task}"
    try:
        suite = suite_of(name, {"size": rows, "eval_size": EVAL_ROWS})
        found = train_rows(suite)
        try:
            held_out = held_out_rows(suite, suite).rows
        except VdrError as error:
            held_out = []
            print(f"  {task}: {error}", file=sys.stderr)
    except VdrError as error:
        return {"task": task, "error": str(error)}
    every = [*found, *held_out]
    prompts = [
        Prompt(at, row["prompt"], [1], {k: v for k, v in row.items() if k != "prompt"}) for at, row in enumerate(every)
    ]
    answers = [row["answer"] or "" for row in every]
    ours = compute_rewards(load_rewards(RewardsConfig(), name), prompts, answers, [[1]] * len(every), 300.0)[:, 0]
    theirs = []
    for row in every:
        entry = entry_of(row["task"], row["settings"], row["index"])
        answer = entry["answer"] if row["answer"] is not None else ""
        theirs.append(float(generator(row["task"], row["settings"]).score_answer(answer=answer, entry=entry)))
    return {
        "task": task,
        "rows": len(found),
        "held_out": len(held_out),
        "has_reference": all(row["answer"] is not None for row in every),
        "disjoint": not {row["prompt"] for row in found} & {row["prompt"] for row in held_out},
        "score": [round(float(value), 6) for value in ours],
        "own_score": [round(value, 6) for value in theirs],
        "digest": hashlib.sha256(json.dumps(every, sort_keys=True).encode()).hexdigest(),
        "seconds": round(time.monotonic() - start, 2),
    }


def answers_of(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """The second process's findings, task by task, as they arrive. Lines that verifiers print are skipped."""
    assert process.stdout is not None
    yield from (json.loads(line.removeprefix(MARK)) for line in process.stdout if line.startswith(MARK))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10, help="training rows a task")
    parser.add_argument("--json", type=Path, help="write what was found here")
    parser.add_argument("--tasks", nargs="*", help="default: all")
    parser.add_argument("--again", action="store_true", help=argparse.SUPPRESS)  # the second process: a line a task
    arguments = parser.parse_args()
    names = arguments.tasks or tasks()
    if arguments.again:
        for task in names:
            print(MARK + json.dumps(checked(task, arguments.rows)), flush=True)
        return 0
    command = [sys.executable, __file__, "--again", "--rows", str(arguments.rows), "--tasks", *names]
    other = subprocess.Popen(command, env={**os.environ, "PYTHONHASHSEED": "7"}, stdout=subprocess.PIPE, text=True)
    again = answers_of(other)
    wrong = 0
    results = []
    for task in names:
        result = checked(task, arguments.rows)
        result["repeats"] = result.get("digest") == next(again, {}).get("digest", "none")
        results.append(result)
        remarks = [
            text
            for text, applies in (
                (f"no rows: {result.get('error')}", "error" in result),
                ("other rows in a second process", not result["repeats"]),
                ("held-out rows occur in training", not result.get("disjoint", True)),
                ("our score is not the package's", result.get("score") != result.get("own_score")),
            )
            if applies
        ]
        wrong += bool(remarks)
        least = min(result.get("own_score", [1.0]))
        if least < 1:
            what = "its own reference answer" if result["has_reference"] else "no reference answer, and the empty one"
            remarks.append(f"the package gives {what} {least:g}")
        print(f"{task:32} {result.get('seconds', 0):6.2f} s  {'; '.join(remarks) or 'ok'}", flush=True)
    other.wait()
    print(f"{len(names)} tasks, {wrong} with something wrong")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
