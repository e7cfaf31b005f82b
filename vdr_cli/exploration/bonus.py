"""From measures to what is added to the advantage: reduction, credit, gates, schedules, shapes. Pure functions.

Groups are contiguous rows, G of them. b is a completion's reduced measure (B,), or a credit per token (B, T).
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


STEPS_BEFORE_WARNING = 20
"""Consecutive steps before a condition is reported."""


def reduce(statistic: Tensor, mask: Tensor, last_n: int | None = None) -> Tensor:
    """(B, T) measure to (B,): its mean over the valid tokens, or the last n of them; 0 for an empty completion.

    A (B,) measure, as `end_of_sequence` gives, is its own reduction.
    """
    if statistic.ndim == 1:
        return statistic.float()
    kept = last_tokens(mask, last_n)
    return ((statistic.double() * kept).sum(-1) / kept.sum(-1).clamp_min(1)).float()


def token_credit(
    statistic: Tensor,
    mask: Tensor,
    measure: Literal["bald", "rmi"] = "bald",
    discount: float = 1.0,
    last_n: int | None = None,
) -> Tensor:
    """The credit of each token for what follows it: c_t = Σ_{s>=t} γ^{s-t} m_s, (B, T).

    m_s = bald_{s+1}, 0 at the last valid token: bald_s depends on the prefix before s alone, so crediting it to
    token s itself adds a baseline, whose expected gradient is 0. m_s = rmi_s: it depends on token s.
    """
    kept = last_tokens(mask, last_n)
    reward = statistic.double() * kept
    if measure == "bald":
        reward = torch.nn.functional.pad(reward[:, 1:], (0, 1))
    credit = torch.zeros_like(reward)
    following = reward.new_zeros(len(reward))
    for t in range(reward.shape[1] - 1, -1, -1):
        following = reward[:, t] + discount * following
        credit[:, t] = following
    return (credit * mask).float()


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


def gated(
    gate: Literal["all", "incorrect", "zero_variance"], task_rewards: Tensor, solved: Tensor, group_size: int
) -> Tensor:
    """(B,) bool: completions that get a bonus. Task rewards, never shaped ones, decide."""
    if gate == "incorrect":
        return ~solved.bool()
    if gate == "zero_variance":
        return zero_variance(task_rewards, group_size).repeat_interleave(group_size)
    return torch.ones(len(task_rewards), dtype=torch.bool, device=task_rewards.device)


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
    """Root mean square of the within-group deviation over the last steps, weighted by decay^age, unbiased (Adam)."""

    decay: float = 0.99
    average: float = 0.0
    weight: float = 0.0

    def update(self, squares: float, count: float) -> None:
        """Take in one step's sums over all ranks. A step without values changes nothing."""
        if count > 0:
            self.average = self.decay * self.average + (1 - self.decay) * squares / count
            self.weight = self.decay * self.weight + (1 - self.decay)

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
    shape: Literal["additive", "multiplicative", "quality"],
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
    """(advantages, bonus), (B,) each, or (B, T) with a credit per token (b and mask (B, T); additive only).

    additive: A_task + λ·clip((b - μ)/rms, ±c). multiplicative: A_task·(1 + β·sigmoid(relu(z))).
    quality: A_task·coef/mean_G(coef), coef = 1 + β·sigmoid(r - mean_G r)·sigmoid(relu(z)).
    z = clip((b - μ)/(σ + 1e-6), ±c). The bonus is what was added, A - A_task; 0 where the gate is closed.
    """
    if shape == "additive":
        per_row = gate if b.ndim == 1 else gate.unsqueeze(1)
        task = task_advantages if b.ndim == 1 else task_advantages.unsqueeze(1)
        bonus = weight * (group_deviation(b, group_size, mask) / rms).clamp(-clip, clip) * per_row
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


@dataclass
class BonusWatch:
    """Warns once when the bonus does nothing, and once when it outweighs the task, for many consecutive steps."""

    measure: str
    dropout: float
    scope: str
    """Settings of the ensemble that the warnings name."""
    flat_after: int = STEPS_BEFORE_WARNING
    outweighed_after: int = STEPS_BEFORE_WARNING
    flat: int = 0
    """Consecutive steps so far without any spread."""
    outweighed: int = 0
    """Consecutive steps so far in which the bonus was larger than the task advantage."""
    warned: frozenset[str] = frozenset()

    def warning(self, spread: bool, bonus: float, task: float) -> str | None:
        """Count one step; the warning that is due, or None.

        spread: the measures differ within some group. bonus, task: mean absolute values over the step.
        """
        self.flat = 0 if spread else self.flat + 1
        self.outweighed = self.outweighed + 1 if bonus > task else 0
        if self.flat >= self.flat_after and "flat" not in self.warned:
            self.warned |= {"flat"}
            return (
                f"the {self.measure} of the completions has not differed within any group for {self.flat} steps, so "
                f"the bonus is 0: groups of equal completions, or members that agree (disagreement.dropout is "
                f"{self.dropout}, scope {self.scope})"
            )
        if self.outweighed >= self.outweighed_after and "outweighed" not in self.warned:
            self.warned |= {"outweighed"}
            return (
                f"the bonus has been larger than the task advantage for {self.outweighed} steps: task rewards "
                "are equal in most groups, or disagreement.weight is too large; lower it or give it a schedule"
            )
        return None
