"""Problems of reasoning-gym in a process of its own: python -m vdr_cli.beds.gym_generate, pickles on stdin and stdout.

Some generators iterate over sets of strings or draw from the global generators, so their problems depend on Python's
hash seed and on what ran before. Here the hash seed is 0 and the global generators are seeded with the problem's
number: every rank, and a resumed run, gets the same problems. What generators print goes to stderr.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from vdr_cli.errors import DataError
from vdr_cli.system.text import reason

Request = tuple[str, str, int]
"""Task, its generator's settings as JSON, the problem's number."""


def generated(requests: Sequence[Request]) -> list[dict[str, Any]]:
    """The problems, whole. DataError names the first that cannot be generated."""
    command = [sys.executable, "-m", "vdr_cli.beds.gym_generate"]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    child = subprocess.run(command, input=pickle.dumps(list(requests)), capture_output=True, env=environment)
    if child.returncode != 0:
        last = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise DataError(f"reasoning-gym's generator ended with code {child.returncode} ({''.join(last)[:200]})")
    found: list[tuple[dict[str, Any] | None, str]] = pickle.loads(child.stdout)
    for (task, _, index), (_, problem) in zip(requests, found, strict=True):
        if problem:
            raise DataError(f"reasoning_gym task {task}: problem {index} cannot be generated ({problem})")
    return [made for made, _ in found if made is not None]


def main() -> None:
    """Answer one pickled list of requests with a pickled list of (problem, error text)."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with answer:
        pickle.dump([entry(*request) for request in pickle.load(sys.stdin.buffer)], answer)


def entry(task: str, settings: str, index: int) -> tuple[dict[str, Any] | None, str]:
    """The problem, or None and what the generator said."""
    import numpy as np
    from reasoning_gym.factory import DATASETS

    key = (task, settings)
    try:
        if key not in _data_sets:
            kind, config = DATASETS[task]
            _data_sets[key] = kind(config=config(**json.loads(settings)))
        random.seed(index)
        np.random.seed(index % 2**32)
        made = _data_sets[key][index]
        pickle.dumps(made)
        return made, ""
    except Exception as error:  # generators raise what they like
        return None, reason(error)


_data_sets: dict[tuple[str, str], Any] = {}


if __name__ == "__main__":
    main()
