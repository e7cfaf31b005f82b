"""Disjoint parts of one rollout, an optimizer step each (`grpo.minibatches`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdr_cli.config import Config
from vdr_cli.engine import collectives
from vdr_cli.samples import Completions
from vdr_cli.training.reading import read_logps
from vdr_cli.training.resources import Resources


def rows_of_minibatches(first: int, groups: int, minibatches: int, group_size: int) -> list[Tensor]:
    """The rows of this rank in each minibatch, (b,) int64 in ascending order; `first` groups are on lower ranks.

    Group g of the step, counted over all ranks, belongs to minibatch g mod `minibatches`. Groups stay whole, so that a
    minibatch holds complete comparisons. The same groups form a minibatch on any number of ranks,
    and every rank has its share of each.
    """
    number = first + torch.arange(groups)
    rows = torch.arange(groups * group_size).view(groups, group_size)
    return [rows[number % minibatches == part].flatten() for part in range(minibatches)]


def own_minibatches(config: Config) -> list[Tensor]:
    """`rows_of_minibatches` of this rank, which holds an even share of the step's groups."""
    first, groups = own_groups(config)
    return rows_of_minibatches(first, groups, config.grpo.minibatches, config.rollout.group_size)


def own_groups(config: Config) -> tuple[int, int]:
    """The number of the step's groups on lower ranks, and on this one."""
    counts, rank = collectives.even_shares(config.train.prompts_per_step), collectives.rank()
    return sum(counts[:rank]), counts[rank]


def read_old_logps(res: Resources, model: Any, completions: Completions) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (B, T) under the gathered policy, before any update of this rollout. Collective.

    Each minibatch is read in the micro-batches in which it is trained, so unchanged weights give a ratio of exactly 1.
    """
    logps = torch.zeros(completions.completion_ids.shape)
    entropy = torch.zeros_like(logps)
    for rows in own_minibatches(res.config):
        logps[rows], entropy[rows] = read_logps(res, model, completions.rows(rows))
    return logps, entropy
