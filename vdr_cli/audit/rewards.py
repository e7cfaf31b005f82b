"""Rewards and advantages in float64 NumPy, from docs/losses.md. NaN is a reward of None; groups are G rows in a row."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FLOOR = 1e-4
"""Added to every standard deviation that divides."""
SLACK = 1e-6
"""Rounding of a weighted sum of float32 rewards near 1."""


def combined(rewards: Array, weights: Array) -> Array:
    """(B, F), (F,) to (B,): the weighted sum over the functions that gave a number; NaN where none did."""
    silent = np.isnan(rewards)
    total = np.where(silent, 0.0, rewards * weights).sum(1)
    return np.where(silent.all(1), np.nan, total)


def solved(task_rewards: Array, solved_at: float) -> NDArray[np.bool_]:
    """(B,): the task reward is at least solved_at, but for rounding."""
    return task_rewards >= solved_at - SLACK * max(1.0, abs(solved_at))


def overlong_penalty(lengths: Array, longest: int, cache: int) -> Array:
    """(B,) in [-1, 0]: DAPO's equation 13; 0 without a cache."""
    if cache == 0:
        return np.zeros(len(lengths))
    return np.clip((longest - cache - lengths) / cache, -1.0, 0.0)


def group_std(values: Array, G: int) -> Array:
    """(B,) to (groups,): ddof 1 over the known values, 0 for one, NaN for none."""
    found = []
    for group in values.reshape(-1, G):
        known = group[~np.isnan(group)]
        found.append(np.nan if len(known) == 0 else 0.0 if len(known) == 1 else known.std(ddof=1))
    return np.array(found)


def group_mean(values: Array, G: int) -> Array:
    """(B,) to (groups,); NaN for a group without a known value."""
    known = ~np.isnan(values.reshape(-1, G))
    total = np.where(known, values.reshape(-1, G), 0.0).sum(1)
    count = known.sum(1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def stalled(values: Array, G: int) -> NDArray[np.bool_]:
    """(groups,): the known values are all equal, or there are fewer than two."""
    known = [group[~np.isnan(group)] for group in values.reshape(-1, G)]
    return np.array([len(group) < 2 or group.max() == group.min() for group in known])


def advantages(values: Array, G: int, scale: str) -> Array:
    """(B,): (r - mean)/(s + 1e-4), s the group's or the step's standard deviation, or r - mean; 0 where r is None."""
    deviation = values - np.repeat(group_mean(values, G), G)
    if scale == "group":
        deviation = deviation / (np.repeat(group_std(values, G), G) + FLOOR)
    elif scale == "batch":
        deviation = deviation / (_step_std(values) + FLOOR)
    return np.where(np.isnan(values), 0.0, deviation)


def other_advantages(values: Array, G: int, kind: str, k: int) -> Array:
    """(B,): leave_one_out, maxrl or pass_at_k, group by group from their definitions; 0 where r is None."""
    found = np.zeros(len(values))
    for start in range(0, len(values), G):
        known = start + np.flatnonzero(~np.isnan(values[start : start + G]))
        found[known] = _OTHERS[kind](values[known], k) if len(known) else 0.0
    return found


def _leave_one_out(r: Array, k: int) -> Array:
    return np.array([r[i] - np.delete(r, i).mean() if len(r) > 1 else 0.0 for i in range(len(r))])


def _maxrl(r: Array, k: int) -> Array:
    return (r - r.mean()) / r.mean() if r.mean() > 0 else np.zeros(len(r))


def _pass_at_k(r: Array, k: int) -> Array:
    """Every subset of k is looked at."""
    if len(r) < k or r.max() == r.min():
        return np.zeros(len(r))
    subsets = np.array(list(itertools.combinations(range(len(r)), k)))
    best = r[subsets].max(1)
    if best.std() <= 1e-7 * (r.max() - r.min()):
        return np.zeros(len(r))
    return np.array([(best[(subsets == i).any(1)].mean() - best.mean()) / best.std() for i in range(len(r))])


_OTHERS = {"leave_one_out": _leave_one_out, "maxrl": _maxrl, "pass_at_k": _pass_at_k}


def summed_advantages(columns: Array, weights: Array, added: Array, G: int) -> Array:
    """(B, F) to (B,): each column's group scores, weighed, summed, and standardised over the step (GDPO).

    added: (B,), what joins the sum with its group's mean taken off.
    """
    scores = np.full(columns.shape, np.nan)
    for index, column in enumerate(columns.T):
        mean, std = group_mean(column, G), group_std(column, G)
        scores[:, index] = (column - np.repeat(mean, G)) / (np.repeat(std, G) + FLOOR)
    total = combined(scores, weights) + added - np.repeat(group_mean(added, G), G)
    known = total[~np.isnan(total)]
    mean_of_step = known.mean() if len(known) else 0.0
    return np.where(np.isnan(total), 0.0, (total - mean_of_step) / (_step_std(total) + FLOOR))


def _step_std(values: Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else 0.0
