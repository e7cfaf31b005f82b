"""The numbers that a study compares, from what each run left: counts a prompt, and its metrics. Pure.

A number of a run is an array (P,), one value per prompt, whose mean is the run's; or a single number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from vdr_cli.errors import ConfigError
from vdr_cli.stats.passk import pass_at_k
from vdr_cli.study.schema import MOST_K
from vdr_cli.system.text import did_you_mean

Array = NDArray[np.float64]

PASS = re.compile(r"pass@([1-9]\d*)")
NAMES = {
    "area": "area under pass@k over log k, from 1 to {most} completions, as a share of what is possible",
    "classes": "different solutions of a problem among its completions",
    "new_problems": "problems solved that the start solved in none of its completions",
    "reward": "mean reward of a completion",
    "first_success": "training steps up to the first solved completion, or all of them",
}
LOWER_IS_BETTER = ("first_success",)
NEEDS_START = ("new_problems",)
"""Numbers of a run that depend on the starting model's completions."""


@dataclass(frozen=True)
class Measured:
    """Counts of one run's completions. The arrays have one value per prompt, (P,)."""

    samples: int
    """Completions per prompt."""
    solved: NDArray[np.int64]
    """Completions that solved the prompt."""
    classes: NDArray[np.int64]
    """Different solutions among them."""
    reward: Array
    """Mean reward."""
    first_success: float
    """Steps up to the first solved completion in training; all its steps if there was none."""


def check_endpoint(name: str, samples: int, where: str) -> None:
    """Raise ConfigError, with the nearest name, for a number that nothing computes."""
    found = PASS.fullmatch(name)
    if found and int(found[1]) > samples:
        raise ConfigError(
            f"{where}: {name} needs {found[1]} completions per problem and evaluation.samples is {samples}; raise it"
        )
    if not found and name not in NAMES:
        known = [f"pass@{k}" for k in ks_up_to(samples)] + list(NAMES)
        hint = did_you_mean(name, known, f"there are pass@K, {', '.join(NAMES)}")
        raise ConfigError(f"{where}: nothing computes {name}; {hint}")


def described(name: str, samples: int) -> str:
    """The number in words."""
    found = PASS.fullmatch(name)
    if found:
        return f"share of problems that {found[1]} completions solve" if found[1] != "1" else "share solved"
    return NAMES[name].format(most=min(MOST_K, samples))


def value_of(name: str, run: Measured, start: Measured | None) -> Array | float:
    """The number of this run: one value per prompt, (P,), or one for all. NaN where the start was not measured."""
    if found := PASS.fullmatch(name):
        return pass_at(run.samples, run.solved, int(found[1]))
    if name == "area":
        return area_under_pass(run.samples, run.solved)
    if name == "classes":
        return run.classes.astype(np.float64)
    if name == "new_problems":
        if start is None:
            return math.nan
        return ((run.solved > 0) & (start.solved == 0)).astype(np.float64) * len(run.solved)
    return run.reward if name == "reward" else run.first_success


def ks_up_to(samples: int) -> list[int]:
    """1, 2, 4, ... and the number of completions itself, up to MOST_K."""
    most = min(samples, MOST_K)
    return sorted({2**power for power in range(most.bit_length())} | {most})


def pass_at(samples: int, solved: NDArray[np.int64], k: int) -> Array:
    """pass@k of every count in `solved`, an array of any shape."""
    return np.asarray(_pass_table(samples, k)[solved])


@cache
def _pass_table(samples: int, k: int) -> Array:
    """pass@k of 0, 1, ..., `samples` solved completions: hundreds of runs ask for the same few."""
    return pass_at_k(samples, np.arange(samples + 1), k)


def area_under_pass(samples: int, solved: NDArray[np.int64]) -> Array:
    """(P,) area under pass@k over log2 k by trapezoids, divided by the width: 1 where every completion solves."""
    ks = ks_up_to(samples)
    curves = np.stack([pass_at(samples, solved, k) for k in ks])  # (K, P)
    if len(ks) == 1:
        return np.asarray(curves[0])
    widths = np.diff(np.log2(ks))[:, None]
    return np.asarray((widths * (curves[1:] + curves[:-1]) / 2).sum(0) / math.log2(ks[-1]))


def first_success(lines: Iterable[Mapping[str, float]]) -> float:
    """The first step of metrics.jsonl with a solved completion; the last step if there is none; NaN without steps."""
    last = math.nan
    for line in lines:
        if "solved" not in line:  # held-out numbers before the first step
            continue
        last = float(line["step"])
        if line["solved"] > 0:
            return last
    return last
