"""Rewards to advantages: pure functions of (B,) or (B, F) tensors. NaN means "no reward" everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STD_FLOOR = 1e-4
"""Added to every standard deviation that divides, as in GRPO's implementations."""


@dataclass(frozen=True)
class Moments:
    """Sums over values that are not NaN; add those of all ranks to get the step's mean and standard deviation."""

    count: float
    total: float
    squares: float

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Sums of a tensor of any shape, in float64."""
        kept = values[~values.isnan()].double()
        return cls(float(kept.numel()), float(kept.sum()), float(kept.square().sum()))

    @property
    def mean(self) -> float:
        """0 where there is no value."""
        return self.total / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        """ddof 1; 0 below two values."""
        if self.count < 2:
            return 0.0
        variance = (self.squares - self.total**2 / self.count) / (self.count - 1)
        return float(max(variance, 0.0) ** 0.5)


def combine_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """rewards (B, F), weights (F,) → (B,): Σ_f w_f r_f over the functions that gave a number; NaN where none did."""
    combined = (rewards * weights.to(rewards)).nansum(dim=1)
    return combined.masked_fill(rewards.isnan().all(dim=1), torch.nan)


def normalised_sum(rewards: Tensor, weights: Tensor, group_size: int) -> Tensor:
    """rewards (B, F) → (B,): Σ_f w_f (r_f − mean_G)/(std_G + 1e-4), each function normalised in its groups first.

    GDPO (Liu et al. 2026): functions of different scale keep their say. The paper standardises the result over
    the step: `standardise`.
    """
    normalised = torch.stack([_group_scores(column, group_size) for column in rewards.unbind(1)], dim=1)
    return combine_rewards(normalised, weights)


def standardise(values: Tensor, step: Moments) -> Tensor:
    """(B,) → (values − mean)/(std + 1e-4) with the mean and standard deviation of the whole step; NaN → 0."""
    return ((values - step.mean) / (step.std + STD_FLOOR)).masked_fill(values.isnan(), 0.0)


def group_moments(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """rewards (B,) → mean and standard deviation (ddof 1) of each group, (B/G,). No valid member: NaN; one: std 0.

    Summed in float64: the mean of equal float32 rewards is then that reward exactly, and their advantage exactly 0.
    """
    groups = rewards.view(-1, group_size).double()
    count = (~groups.isnan()).sum(dim=1)
    mean = groups.nanmean(dim=1)
    squares = (groups - mean[:, None]).square().nansum(dim=1)
    std = (squares / (count - 1).clamp_min(1)).sqrt()
    return mean.to(rewards.dtype), std.to(rewards.dtype)


def group_advantages(rewards: Tensor, group_size: int, scale: str = "group", batch_std: float | None = None) -> Tensor:
    """rewards (B,) → advantages (B,): (r − mean_G)/(s + 1e-4); a reward of NaN gives 0. One that is infinite
    leaves its group's advantages not finite, so that the step is refused.

    scale `group`: s = std_G, ddof 1 (GRPO, Shao et al. 2024). `batch`: s = batch_std, the standard deviation
    of all rewards of the step over all ranks. `none`: r − mean_G (Dr. GRPO, Liu et al. 2025).
    """
    if scale == "group":
        advantages = _group_scores(rewards, group_size)
    else:
        advantages = centred(rewards, group_size)
        if scale == "batch":
            if batch_std is None:
                raise ValueError("scale batch needs batch_std, the standard deviation of the whole step's rewards")
            advantages = advantages / (batch_std + STD_FLOOR)
    return advantages.masked_fill(rewards.isnan(), 0.0)


def centred(rewards: Tensor, group_size: int) -> Tensor:
    """(B,) → r − mean_G, NaN kept."""
    mean, _ = group_moments(rewards, group_size)
    return rewards - mean.repeat_interleave(group_size)


def zero_variance(rewards: Tensor, group_size: int) -> Tensor:
    """rewards (B,) → (B/G,) bool: groups whose rewards are all equal, or that have fewer than two."""
    groups = rewards.view(-1, group_size)
    highest = groups.nan_to_num(nan=-torch.inf).amax(dim=1)
    lowest = groups.nan_to_num(nan=torch.inf).amin(dim=1)
    return highest <= lowest


def overlong_penalty(lengths: Tensor, max_new_tokens: int, cache: int) -> Tensor:
    """lengths (B,) in tokens → (B,) in [−1, 0], to add to the reward.

    DAPO (Yu et al. 2025), eq. 13: 0 up to L_max − L_cache, then ((L_max − L_cache) − |y|)/L_cache, −1 beyond L_max.
    """
    if cache == 0:
        return torch.zeros(lengths.shape, dtype=torch.float32, device=lengths.device)
    return ((max_new_tokens - cache - lengths.float()) / cache).clamp(-1.0, 0.0)


def _group_scores(rewards: Tensor, group_size: int) -> Tensor:
    """(B,) → (r − mean_G)/(std_G + 1e-4), NaN kept."""
    _, std = group_moments(rewards, group_size)
    return centred(rewards, group_size) / (std + STD_FLOOR).repeat_interleave(group_size)
