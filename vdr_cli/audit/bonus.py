"""The bonus in float64 NumPy, from docs/exploration.md.

b is a number per completion (B,), or one per token (B, T).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vdr_cli.audit.rewards import solved, stalled

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

EQUAL = 2.0**-20
"""Nats; measures of a group closer than this, relative to 1 + |b|, are equal."""


@dataclass(frozen=True)
class Rms:
    """Root mean square of b - μ over the steps so far, each step's weighed by decay^age."""

    average: float = 0.0
    weight: float = 0.0
    decay: float = 0.99

    def after(self, deviation: Array, mask: Flags, first: int | None = None) -> Rms:
        """With one more step's deviations, of which those in the mask count.

        first: only so many steps count, all alike; None: every step.
        """
        if not mask.any() or not np.isfinite(deviation[mask]).all() or (first is not None and self.weight >= first):
            return self
        square = float((deviation[mask] ** 2).mean())
        if first is not None:
            return Rms(self.average + square, self.weight + 1.0, self.decay)
        keep = self.decay
        return Rms(keep * self.average + (1 - keep) * square, keep * self.weight + (1 - keep), keep)

    @property
    def value(self) -> float:
        return max(math.sqrt(self.average / self.weight) if self.weight else 0.0, EQUAL)


def weight_at(schedule: str, weight: float, fraction: float, step: int, steps: int) -> float:
    """λ or β of a step (from 0): from `weight` to 0 over this fraction of the run; the staircase has four stairs."""
    gone = min(step / (fraction * steps), 1.0)
    if schedule == "linear":
        return weight * (1.0 - gone)
    if schedule == "cosine":
        return weight * (1.0 + math.cos(math.pi * gone)) / 2.0
    if schedule == "staircase":
        return weight * (4 - math.floor(4 * gone)) / 4.0
    return weight


def counted(mask: Flags, last_n: int | None) -> Flags:
    """(B, T): the last n valid tokens of each row; None: all."""
    kept = np.zeros_like(mask)
    for row, valid in enumerate(mask):
        places = np.flatnonzero(valid)
        kept[row, places if last_n is None else places[-last_n:]] = True
    return kept


def reduced(measure: Array, mask: Flags, last_n: int | None) -> Array:
    """(B, T) to (B,): the mean over the counted tokens, 0 where there are none."""
    kept = counted(mask, last_n)
    return np.where(kept, measure, 0.0).sum(1) / np.maximum(kept.sum(1), 1)


def credit(measure: Array, mask: Flags, name: str, discount: float, last_n: int | None) -> Array:
    """(B, T): c_t = Σ_{s≥t} γ^(s-t) m_s with m_s = bald_{s+1}, 0 at the end, or m_s = rmi_s."""
    kept = np.where(counted(mask, last_n), measure, 0.0)
    found = np.zeros_like(measure)
    for row, valid in enumerate(mask):
        places = np.flatnonzero(valid)
        own = kept[row, places]
        m = np.append(own[1:], 0.0)[: len(own)] if name == "bald" else own
        for t, place in enumerate(places):
            found[row, place] = sum(discount ** (s - t) * m[s] for s in range(t, len(m)))
    return found


def open_gate(gate: str, task_reward: Array, solved_at: float, G: int) -> Flags:
    """(B,): completions that get a bonus; the task reward decides, and without one there is none."""
    right, known = solved(task_reward, solved_at), ~np.isnan(task_reward)
    if gate == "incorrect":
        return known & ~right
    if gate == "correct":
        return right
    if gate == "some_correct":
        return known & np.repeat(right.reshape(-1, G).any(1), G)
    if gate == "zero_variance":
        return known & np.repeat(stalled(task_reward, G), G)
    if gate == "not_failed":
        return known & np.repeat(~stalled(task_reward, G) | right.reshape(-1, G).any(1), G)
    return known


def permuted(b: Array, mask: Flags, keys: Array, G: int) -> Array:
    """(B, T): in each group and column, the valid rows exchange their values; keys (B,) decide the order."""
    found = b.copy()
    for start in range(0, len(b), G):
        for t in range(b.shape[1]):
            rows = [row for row in range(start, start + G) if mask[row, t]]
            for row, other in zip(rows, sorted(rows, key=lambda each: keys[each]), strict=True):
                found[row, t] = b[other, t]
    return found


def spread(b: Array, mask: Flags, G: int) -> Flags:
    """(groups,): somewhere in the group values differ by more than rounding."""
    found = []
    for values, valid in zip(b.reshape(-1, G, b.shape[1]), mask.reshape(-1, G, b.shape[1]), strict=True):
        columns = [values[valid[:, t], t] for t in range(values.shape[1]) if valid[:, t].any()]
        found.append(any(c.max() - c.min() > EQUAL * (1.0 + abs(c.max())) for c in columns))
    return np.array(found)


def deviation(b: Array, mask: Flags, G: int) -> Array:
    """(B, T): b - μ, μ over the group's valid values at the same position; 0 in groups without spread."""
    found = np.zeros_like(b)
    differs = spread(b, mask, G)
    for group in np.flatnonzero(differs):
        rows = slice(group * G, (group + 1) * G)
        for t in range(b.shape[1]):
            valid = mask[rows, t]
            if valid.any():
                found[rows, t] = np.where(valid, b[rows, t] - b[rows, t][valid].mean(), 0.0)
    return found


def shaped(shape: str, task: Array, rewards: Array, b: Array, gate: Flags, G: int, weight: float, clip: float) -> Array:
    """(B,) advantages of the shapes `multiplicative` and `quality`."""
    from_mean = deviation(b[:, None], np.ones((len(b), 1), dtype=bool), G)[:, 0]
    sigma = np.sqrt((from_mean.reshape(-1, G) ** 2).sum(1) / (G - 1))
    z = np.clip(from_mean / (np.repeat(sigma, G) + 1e-6), -clip, clip)
    surprise = weight * _sigmoid(np.maximum(z, 0.0)) * gate
    if shape == "multiplicative":
        return task * (1.0 + surprise)
    known = np.where(np.isnan(rewards), 0.0, rewards).reshape(-1, G)
    count = (~np.isnan(rewards)).reshape(-1, G).sum(1)
    mean = np.repeat(known.sum(1) / np.maximum(count, 1), G)
    coefficient = 1.0 + _sigmoid(np.where(np.isnan(rewards), 0.0, rewards - mean)) * surprise
    return task * coefficient / np.repeat(coefficient.reshape(-1, G).mean(1), G)


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))
