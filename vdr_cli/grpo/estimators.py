"""Other advantages than GRPO's, by name. Each is a pure function of (B,) rewards; NaN means "no reward" and gives 0."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from vdr_cli.grpo.advantages import zero_variance

LEAST_SPREAD = 1e-7
"""Standard deviation of the best of k, as a share of the rewards' range, that counts as none: rounding is below it."""


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """(B,) r − the mean of the group's other rewards; 0 without others.

    RLOO (Ahmadian et al. 2024, arXiv 2402.14740, eq. 8).
    """
    groups = rewards.view(-1, group_size).double()
    count = (~groups.isnan()).sum(1, keepdim=True)
    others = (groups.nansum(1, keepdim=True) - groups) / (count - 1).clamp_min(1)
    return _finished(torch.where(count > 1, groups - others, 0.0), rewards)


def maxrl(rewards: Tensor, group_size: int) -> Tensor:
    """(B,) (r − mean_G) / mean_G, for rewards that are not negative; 0 where the mean is not above 0.

    MaxRL (arXiv 2602.02710): problems count by the inverse of their success rate.
    """
    groups = rewards.view(-1, group_size).double()
    mean = groups.nanmean(1, keepdim=True)
    return _finished(torch.where(mean > 0, (groups - mean) / mean, 0.0), rewards)


def pass_at_k(rewards: Tensor, group_size: int, k: int) -> Tensor:
    """(B,) what a completion adds to the best of k, over all subsets of k completions of its group.

    A_i = (E[max_S | i ∈ S] − E[max_S]) / std[max_S], S uniform among the subsets of k. For rewards of 0 and 1 this is
    the pass@k advantage of Chen et al. (2025, arXiv 2508.10751, eq. 12 to 16); for others the max@k estimator of PKPO
    (Walder & Karkhanis 2025, arXiv 2505.15201), standardised alike. 0 where every subset has the same best, and in
    groups with fewer than k rewards.
    """
    silent = zero_variance(rewards, group_size)
    rows = [
        torch.zeros(group_size, dtype=torch.float64) if is_silent else _best_of_k(group, k)
        for group, is_silent in zip(rewards.view(-1, group_size).double().cpu(), silent.tolist(), strict=True)
    ]
    return _finished(torch.stack(rows), rewards)


def _best_of_k(rewards: Tensor, k: int) -> Tensor:
    """pass_at_k of one group, (G,) float64."""
    advantages = torch.zeros_like(rewards)
    present = (~rewards.isnan()).nonzero()[:, 0]
    if len(present) < k:
        return advantages
    ordered, order = rewards[present].sort()
    best, best_with = _chances(len(ordered), k)
    expected = (best * ordered).sum()
    spread = (best * (ordered - expected).square()).sum().sqrt()
    if spread > LEAST_SPREAD * (ordered[-1] - ordered[0]):
        advantages[present[order]] = (best_with @ ordered - expected) / spread
    return advantages


@functools.cache
def _chances(n: int, k: int) -> tuple[Tensor, Tensor]:
    """For n rewards in ascending order: (n,) the chance that each is the best of k; (n, n) the same given that i is in.

    Exact in integers before the division.
    """
    subsets, with_one = math.comb(n, k), math.comb(n - 1, k - 1)
    best = [math.comb(j, k - 1) / subsets for j in range(n)]
    best_with = [
        [
            math.comb(j, k - 1) / with_one if j == i else (math.comb(j - 1, k - 2) / with_one if j > i and k > 1 else 0)
            for j in range(n)
        ]
        for i in range(n)
    ]
    return torch.tensor(best, dtype=torch.float64), torch.tensor(best_with, dtype=torch.float64)


def _finished(groups: Tensor, rewards: Tensor) -> Tensor:
    """(B/G, G) float64 to (B,) in the rewards' dtype, 0 where there was no reward."""
    return groups.flatten().to(rewards).masked_fill(rewards.isnan(), 0.0)


ADVANTAGES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "leave_one_out": lambda rewards, group_size, k: leave_one_out(rewards, group_size),
    "maxrl": lambda rewards, group_size, k: maxrl(rewards, group_size),
    "pass_at_k": pass_at_k,
}
"""By the name of `grpo.advantage`: rewards (B,), group size and k to advantages (B,)."""
