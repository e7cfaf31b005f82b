"""Source `unlikeliness`: correct completions that were likely earn less (He, Fried and Welleck, arXiv 2506.02355)."""

from __future__ import annotations

import torch
from torch import Tensor

from vdr_cli.exploration.bonus import NOISE, reduce


def unlikeliness(
    log_probs: Tensor, mask: Tensor, task_rewards: Tensor, solved: Tensor, group_size: int, beta: float = 0.25
) -> Tensor:
    """(B,): -β·(rank/G)·r for solved completions, 0 for the others; the paper's r·(1 - β·rank/G) less r.

    rank: the place in the group by mean log-probability, 0 for the least likely, over all completions as in the
    authors' code. Values closer than rounding share the mean of their ranks, where the authors' code takes any order.
    solved: (B,) bool. Shape `reward` with weight 1 adds it before the group is normalised, as the paper does.
    """
    ranks = shared_ranks(reduce(log_probs, mask).double().view(-1, group_size)).flatten()
    bonus = -beta * ranks / group_size * task_rewards.nan_to_num(nan=0.0)
    return (bonus * solved).float()


def shared_ranks(values: Tensor) -> Tensor:
    """(n, G) float64: ranks from 0 in each row; values that rounding could swap share their mean rank."""
    order = values.argsort(dim=1, stable=True)
    ordered = values.gather(1, order)
    steps = ordered.diff(dim=1) > NOISE * (1.0 + ordered[:, 1:].abs())
    tied = torch.nn.functional.pad(steps, (1, 0)).cumsum(1)  # (n, G) number of the run of equal values
    places = torch.arange(values.shape[1], dtype=torch.float64).expand_as(values)
    totals = torch.zeros_like(values).scatter_add_(1, tied, places)
    counts = torch.zeros_like(values).scatter_add_(1, tied, torch.ones_like(values))
    means = (totals / counts.clamp_min(1)).gather(1, tied)
    return torch.zeros_like(values).scatter_(1, order, means)
