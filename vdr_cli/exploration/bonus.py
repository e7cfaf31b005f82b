"""From a source's numbers to what is added to the advantage: gates, schedules, scales, shapes. Pure functions.

Groups are contiguous rows, G of them. b is a number per completion (B,), or one per token (B, T).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vdr_cli.grpo.advantages import zero_variance
from vdr_cli.samples import last_tokens

NOISE = 2.0**-20
"""Nats below which two measures are equal: 1e-6.

bald weighs rounding errors of at most 2^-23 with probabilities that sum to 1, so it is off by about 1e-7; rmi adds
the rounding of a float32 log-probability, up to 16 · 2^-24 = 1e-6. Standardising less than
that turns rounding into reward."""


def reduce(statistic: Tensor, mask: Tensor, last_n: int | None = None) -> Tensor:
    """(B, T) measure to (B,): its mean over the valid tokens, or the last n of them; 0 for an empty completion.

    A (B,) measure, as `end_of_sequence` gives, is its own reduction.
    """
    if statistic.ndim == 1:
        return statistic.float()
    kept = last_tokens(mask, last_n)
    return ((statistic.double() * kept).sum(-1) / kept.sum(-1).clamp_min(1)).float()


def weight_at(schedule: str, weight: float, fraction: float, step: int, steps: int) -> float:
    """λ or β at a step (from 0): `weight`, falling to 0 over this fraction of the run unless the schedule is constant.

    schedule: constant, linear, cosine, or staircase, which falls in four equal steps. KeyError for another name.
    """
    if schedule == "constant":
        return weight
    progress = min(step / (fraction * steps), 1.0)
    falling = {
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "staircase": 1.0 - math.floor(4 * progress) / 4,
    }
    return weight * falling[schedule]


def gated(gate: str, task_rewards: Tensor, solved: Tensor, group_size: int) -> Tensor:
    """(B,) bool: completions that get a bonus. Task rewards, never shaped ones, decide; without one there is none.

    gate: all, not_failed (all but groups whose task rewards are all equal and of which none is solved), some_correct
    (groups with a solved completion), correct, incorrect or zero_variance (groups whose task rewards are all equal).
    solved: (B,) bool. Raises KeyError for another name.
    """
    solved = solved.bool()
    equal = zero_variance(task_rewards, group_size).repeat_interleave(group_size)
    some_correct = solved.view(-1, group_size).any(1).repeat_interleave(group_size)
    open_where = {
        "all": torch.ones_like(solved),
        "not_failed": some_correct | ~equal,
        "some_correct": some_correct,
        "correct": solved,
        "incorrect": ~solved,
        "zero_variance": equal,
    }
    return open_where[gate] & ~task_rewards.isnan()


def permuted(b: Tensor, keys: Tensor, group_size: int, mask: Tensor | None = None) -> Tensor:
    """b shuffled inside each group: the placebo of bonus.permute. The same shape and values as b.

    keys: (B,) one random number per completion, which decides the order. Per token, the completions that are valid at
    a position exchange their values there, so every position keeps its values; completions of equal length exchange
    all their tokens.
    """
    groups = b.view(-1, group_size, *b.shape[1:])
    if mask is None:
        order = keys.view(-1, group_size).argsort(1)
        return groups.gather(1, order).view_as(b)
    found = groups.clone()
    for group, valid, order in zip(
        found, mask.view_as(groups).bool(), keys.view(-1, group_size).argsort(1), strict=True
    ):
        for t in range(group.shape[1]):
            rows = valid[:, t].nonzero().flatten()
            group[rows, t] = group[order[valid[order, t]], t]
    return found.view_as(b)


def group_deviation(b: Tensor, group_size: int, mask: Tensor | None = None) -> Tensor:
    """b - μ, μ the mean over the group: (B,) or (B, T). Exactly 0 in groups without spread (`has_spread`).

    Per token, μ is the mean over the group's completions that have a valid token at the same position t: what follows
    shrinks as t grows, and a baseline that depends on t alone leaves the gradient unbiased.
    """
    groups = b.double().view(-1, group_size, *b.shape[1:])
    valid = torch.ones_like(groups) if mask is None else mask.view_as(groups).double()
    mean = (groups * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1)
    deviation = (groups - mean) * valid
    spread = has_spread(b, group_size, mask).view(-1, *[1] * (groups.ndim - 1))
    return (deviation * spread).float().view_as(b)


def has_spread(b: Tensor, group_size: int, mask: Tensor | None = None) -> Tensor:
    """(B/G,) bool: the group's values differ by more than rounding noise, at some position if per token."""
    groups = b.double().view(-1, group_size, *b.shape[1:])
    valid = torch.ones_like(groups, dtype=torch.bool) if mask is None else mask.view_as(groups).bool()
    highest = groups.masked_fill(~valid, -torch.inf).amax(1)
    lowest = groups.masked_fill(~valid, torch.inf).amin(1)
    differs = highest - lowest > NOISE * (1.0 + highest.abs())
    return differs.view(len(groups), -1).any(-1)


def deviation_sums(b: Tensor, group_size: int, mask: Tensor | None = None) -> tuple[float, float]:
    """(Σ (b - μ)², number of values): add over ranks, then `RunningRms.update`."""
    deviation = group_deviation(b, group_size, mask).double()
    count = b.numel() if mask is None else float(mask.sum())
    return float(deviation.square().sum()), float(count)


@dataclass
class RunningRms:
    """Root mean square of the within-group deviation: over the last steps, weighted by decay^age, unbiased (Adam), or
    over the first steps."""

    decay: float = 0.99
    average: float = 0.0
    weight: float = 0.0

    def update(self, squares: float, count: float, first: int | None = None) -> None:
        """Take in one step's sums over all ranks. A step without values, or with a NaN, changes nothing.

        first: count only so many steps, all alike, and then stay (scale initial); None: every step, by its age.
        """
        keep, new = (self.decay, 1 - self.decay) if first is None else (1.0, 1.0)
        if count > 0 and math.isfinite(squares) and (first is None or self.weight < first):
            self.average = keep * self.average + new * squares / count
            self.weight = keep * self.weight + new

    @property
    def value(self) -> float:
        """Nats; never below NOISE, so that rounding is not scaled up."""
        return max(math.sqrt(self.average / self.weight) if self.weight else 0.0, NOISE)

    def state_dict(self) -> dict[str, float]:
        return {"decay": self.decay, "average": self.average, "weight": self.weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.decay, self.average, self.weight = state["decay"], state["average"], state["weight"]


def shaped_rewards(task_rewards: Tensor, b: Tensor, gate: Tensor, weight: float, group_size: int) -> Tensor:
    """r + λ·b before group normalisation, (B,): shape `reward`. NaN rewards stay NaN.

    Groups without spread keep r: a constant would only leave rounding in their advantages.
    """
    differs = has_spread(b, group_size).repeat_interleave(group_size)
    return task_rewards + weight * b * gate * differs


def shaped_advantages(
    shape: Literal["additive", "plain", "multiplicative", "quality"],
    task_advantages: Tensor,
    task_rewards: Tensor,
    b: Tensor,
    gate: Tensor,
    group_size: int,
    weight: float,
    clip: float,
    rms: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(advantages, bonus), (B,) each, or (B, T) for b and mask (B, T), which additive and plain alone take.

    additive: A_task + λ·clip((b - μ)/rms, ±c). plain: A_task + λ·clip(b, ±c).
    multiplicative: A_task·(1 + β·sigmoid(relu(z))).
    quality: A_task·coef/mean_G(coef), coef = 1 + β·sigmoid(r - mean_G r)·sigmoid(relu(z)).
    z = clip((b - μ)/(σ + 1e-6), ±c). The bonus is what was added, A - A_task; 0 where the gate is closed.
    """
    if shape in ("additive", "plain"):
        per_row = gate if b.ndim == 1 else gate.unsqueeze(1)
        task = task_advantages if b.ndim == 1 else task_advantages.unsqueeze(1)
        valid = b if mask is None else b * mask
        size = valid if shape == "plain" else group_deviation(b, group_size, mask) / rms
        bonus = weight * size.clamp(-clip, clip) * per_row
        return task + bonus, bonus
    surprise = torch.sigmoid(torch.relu(group_scores(b, group_size, clip))) * weight
    if shape == "multiplicative":
        factor = 1.0 + surprise * gate
    else:
        factor = 1.0 + torch.sigmoid(_centred(task_rewards, group_size)) * surprise * gate
        means = factor.view(-1, group_size).mean(1)
        factor = factor / means.repeat_interleave(group_size)
    advantages = task_advantages * factor
    return advantages, advantages - task_advantages


def group_scores(b: Tensor, group_size: int, clip: float) -> Tensor:
    """z = clip((b - μ)/(σ + 1e-6), ±c) in each group, σ with ddof 1; (B,)."""
    deviation = group_deviation(b, group_size)
    squares = deviation.view(-1, group_size).double().square().sum(1)
    deviations = (squares / (group_size - 1)).sqrt().float().repeat_interleave(group_size)
    return (deviation / (deviations + 1e-6)).clamp(-clip, clip)


def _centred(rewards: Tensor, group_size: int) -> Tensor:
    """r - mean_G r; 0 where there is no reward."""
    groups = rewards.view(-1, group_size)
    return (groups - groups.nanmean(1, keepdim=True)).nan_to_num(nan=0.0).view(-1)
