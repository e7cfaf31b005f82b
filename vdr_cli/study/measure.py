"""Measures one model for a study: `python -m vdr_cli.study.measure REQUEST.json`, a process of its own.

The request names the bed's settings, the model, how many prompts and completions, the seed, and where the counts go.
All runs of a bed get the same prompts and random numbers (vdr_cli/evaluation).
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vdr_cli.config.load import validate
from vdr_cli.errors import VdrError
from vdr_cli.system.files import write_whole
from vdr_cli.system.imports import importing
from vdr_cli.system.text import visible

if TYPE_CHECKING:
    from vdr_cli.evaluation.result import EvalResult


def fingerprint(request: Mapping[str, Any]) -> str:
    """16 hex digits of what decides the counts: not where files lie, nor settings that are the defaults.

    So a study goes on with a version of vdr that has more settings.
    """
    kept = {key: value for key, value in request.items() if key not in ("model", "output", "settings")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def counts_of(result: EvalResult) -> dict[str, Any]:
    """One value a prompt: completions that solved it, different solutions, mean reward."""
    return {
        "samples": int(result.solved.shape[1]),
        "rows": [int(prompt.row) for prompt in result.prompts],
        "solved": result.solved.sum(1).tolist(),
        "classes": [len(found) for found in result.solutions()],
        "reward": [round(float(value), 6) for value in np.nan_to_num(np.nanmean(result.task_reward, axis=1))],
    }


def measure(request: Mapping[str, Any]) -> None:
    """Evaluate the model and write its counts. Raises VdrError."""
    with importing():
        from vdr_cli.evaluation.evaluate import run_eval
    from vdr_cli.evaluation.request import EvalRequest

    config = validate(request["settings"])
    (result,) = run_eval(
        EvalRequest(
            models=(request["model"],),
            data=config.data,
            rewards=config.rewards,
            rollout=config.rollout,
            model=config.model,
            samples=request["samples"],
            ks=(1,),
            prompts=request["prompts"],
            seed=request["seed"],
            entropy=False,
        )
    )
    record = {"request": fingerprint(request), **counts_of(result)}
    path = Path(request["output"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, separators=(",", ":")) + "\n")


def main(path: str) -> int:
    """The exit code; an error that a user can fix is one line on stderr."""
    try:
        measure(json.loads(Path(path).read_text(encoding="utf-8")))
    except VdrError as error:
        print(f"vdr: error: {visible(' '.join(str(error).split()))}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
