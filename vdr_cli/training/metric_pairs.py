"""A step's numbers under TRL's names, as (numerator, denominator) pairs that add up over ranks.

Pure: tensors in, plain numbers out. The loop sums the pairs over all ranks and divides once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vdr_cli.environments.episodes import Counts

Pairs = dict[str, tuple[float, float]]


def reward_pairs(
    rewards: Tensor, task_reward: Tensor, zero_variance: Tensor, group_size: int, names: Sequence[str]
) -> Pairs:
    """rewards (B, F) with NaN where a function was silent, task_reward (B,), zero_variance (groups,) bool."""
    groups = task_reward.view(-1, group_size)
    pairs: Pairs = {
        "reward": _sum_and_count(task_reward),
        "reward_std": _sum_and_count(_nan_std(groups)),
        "frac_reward_zero_std": (float(zero_variance.sum()), float(len(zero_variance))),
    }
    for index, name in enumerate(names):
        pairs[f"rewards/{name}/mean"] = _sum_and_count(rewards[:, index])
        pairs[f"rewards/{name}/std"] = _sum_and_count(_nan_std(rewards[:, index].view(-1, group_size)))
    return pairs


def completion_pairs(policy_mask: Tensor, truncated: Tensor) -> Pairs:
    """policy_mask (B, T) bool, truncated (B,) bool."""
    lengths = policy_mask.sum(1).float()
    return {
        "completions/mean_length": _sum_and_count(lengths),
        "completions/mean_terminated_length": _sum_and_count(lengths[~truncated]),
        "completions/clipped_ratio": (float(truncated.sum()), float(len(truncated))),
    }


def length_extremes(lengths: Tensor, truncated: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Smallest and largest of lengths (B,), and of those that ended; ±inf where none did. truncated (B,) bool."""
    ended = lengths[~truncated]
    least = {
        "completions/min_length": float(lengths.min()),
        "completions/min_terminated_length": float(ended.min()) if len(ended) else math.inf,
    }
    most = {
        "completions/max_length": float(lengths.max()),
        "completions/max_terminated_length": float(ended.max()) if len(ended) else -math.inf,
    }
    return least, most


def distinct_pairs(texts: Sequence[object], group_size: int) -> Pairs:
    """The number of different completions that a group has. texts: B strings, or B lists of one assistant message."""
    plain = [str(text) for text in texts]
    groups = [plain[start : start + group_size] for start in range(0, len(plain), group_size)]
    return {"completions/distinct": (float(sum(len(set(group)) for group in groups)), float(len(groups)))}


def turn_pairs(counts: Sequence[Counts], has_tools: bool) -> Pairs:
    """counts: (B,) of episodes."""
    B, calls = float(len(counts)), float(sum(each.calls for each in counts))
    turns = float(sum(each.turns for each in counts))
    if not has_tools:
        return {"episodes/mean_turns": (turns, B)}
    return {
        "episodes/mean_turns": (turns, B),
        "tools/cut_in_call": (float(sum(each.cut_in_call for each in counts)), B),
        "tools/call_frequency": (calls, B),
        "tools/failure_frequency": (float(sum(each.failures for each in counts)), calls),
        "tools/unreadable_frequency": (float(sum(each.unreadable for each in counts)), turns),
    }


def bonus_pairs(prefix: str, reduced: Tensor, bonus: Tensor, spread: Tensor, gate: Tensor, group_size: int) -> Pairs:
    """reduced (B,): the source's numbers; bonus as added (B,), or (N,) of the valid tokens; spread (groups,) bool;
    gate (B,) bool.
    """
    return {
        f"{prefix}/mean": _sum_and_count(reduced),
        f"{prefix}/group_std": _sum_and_count(reduced.view(-1, group_size).std(1)),
        f"{prefix}/groups_with_spread": (float(spread.sum()), float(len(spread))),
        f"{prefix}/gate_open": (float(gate.sum()), float(len(gate))),
        f"{prefix}/bonus_abs": _sum_and_count(bonus.abs()),
    }


def ratios(pairs: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Numerator over denominator; a metric that nothing contributed to is left out."""
    return {name: top / bottom for name, (top, bottom) in pairs.items() if bottom}


def _sum_and_count(values: Tensor) -> tuple[float, float]:
    known = values[~values.isnan()]
    return float(known.double().sum()), float(known.numel())


def _nan_std(groups: Tensor) -> Tensor:
    """Standard deviation (ddof 1) of each row's known values; NaN when there are fewer than two."""
    known = ~groups.isnan()
    count = known.sum(1)
    mean = torch.nansum(groups, 1) / count.clamp(min=1)
    squares = torch.where(known, (groups - mean[:, None]) ** 2, 0.0).sum(1)
    return torch.where(count > 1, (squares / (count - 1).clamp(min=1)).sqrt(), torch.nan)
