"""A step's metrics, over all ranks."""

from __future__ import annotations

import math
from statistics import mean

from vdr_cli.config import Config
from vdr_cli.engine import collectives
from vdr_cli.exploration.bonus import has_spread
from vdr_cli.grpo.advantages import zero_variance
from vdr_cli.rewards.base import is_solved
from vdr_cli.rewards.logs import summed
from vdr_cli.training import speed
from vdr_cli.training.batch import Advantages, RewardedGroups, Updates
from vdr_cli.training.metric_pairs import (
    Pairs,
    bonus_pairs,
    completion_pairs,
    distinct_pairs,
    length_extremes,
    ratios,
    reward_pairs,
    turn_pairs,
)
from vdr_cli.training.resources import Resources


def step_metrics(res: Resources, batch: RewardedGroups, advantages: Advantages, updates: Updates) -> dict[str, float]:
    """The step's numbers over all ranks. Collective."""
    seconds = res.timer.take()
    lengths = batch.completions.policy_mask.sum(1)
    sums = {
        "loss": updates.loss,
        "step_tokens": float(lengths.sum()),
        "prompt_tokens": float(batch.completions.prompt_mask[:: res.config.rollout.group_size].sum()),
    }
    pairs = own_pairs(res, batch, advantages) | updates.pairs
    totals = sum_pairs(pairs | {name: (value, 0.0) for name, value in sums.items()})
    loss, step_tokens, prompt_tokens = (totals.pop(name)[0] for name in sums)
    least, most = length_extremes(lengths, batch.completions.truncated)
    times = {f"time/{name}": value for name, value in seconds.items()}
    metrics = ratios(totals) | extremes(least | updates.minima, most | updates.maxima | times)
    metrics["step_time"] = metrics.pop("time/step")
    if res.config.grpo.entropy_target is not None:
        metrics["entropy_coef"] = updates.entropy_weight
    metrics |= speed_metrics(res, metrics, step_tokens, prompt_tokens)
    metrics |= logged_metrics(res, batch)
    return metrics | {
        "loss": loss / res.config.grpo.updates_per_rollout,
        "grad_norm": updates.grad_norm,
        "learning_rate": updates.learning_rate,
        "refused_steps": float(sum(updates.refused)),
        "denominator/completions": mean(each.completions for each in updates.totals),
        "denominator/tokens": mean(each.tokens for each in updates.totals),
        "step_tokens": step_tokens,
        "step_prompt_tokens": prompt_tokens * res.config.rollout.group_size,
        "tokens_per_second": step_tokens / metrics["step_time"],
    }


def logged_metrics(res: Resources, batch: RewardedGroups) -> dict[str, float]:
    """The means of what reward functions logged as metrics, over all values of all ranks. A NaN makes a mean NaN.

    Collective if a function takes log_metric.
    """
    if not any(reward.logs_metrics for reward in res.rewards):
        return {}
    return ratios(summed(collectives.gather_objects(batch.logs.metrics)))


def own_pairs(res: Resources, batch: RewardedGroups, advantages: Advantages) -> Pairs:
    """This rank's share of every mean of the step."""
    G = res.config.rollout.group_size
    stalled = zero_variance(batch.task_reward, G)
    names = [reward.name for reward in res.rewards]
    pairs: Pairs = reward_pairs(batch.rewards, batch.task_reward, stalled, G, names)
    pairs |= completion_pairs(batch.completions.policy_mask, batch.completions.truncated)
    pairs |= distinct_pairs(batch.texts, G)
    if batch.counts is not None and res.environments is not None:
        pairs |= turn_pairs(batch.counts, bool(res.environments.contract.tools))
    if advantages.bonus is not None:
        added, of_completion = advantages.bonus.added, advantages.bonus.per_completion
        added = added if added.dim() == 1 else added[batch.completions.policy_mask]
        spread, gate = has_spread(of_completion, G), advantages.bonus.gate
        pairs |= bonus_pairs(bonus_prefix(res.config), of_completion, added, spread, gate, G)
    solved = is_solved(batch.task_reward, res.config.rewards.solved_at)
    pairs["solved"] = (float(solved.sum()), float(len(batch)))
    pairs["advantage_abs"] = (float(advantages.task_advantages.abs().sum()), float(len(batch)))
    return pairs


def bonus_prefix(config: Config) -> str:
    """Prefix of the names of the bonus's metrics."""
    return "disagreement" if config.bonus_source == "disagreement" else "bonus"


def speed_metrics(res: Resources, metrics: dict[str, float], completions: float, prompts: float) -> dict[str, float]:
    """Tokens per second and share of the step of each phase; on a GPU also the share of its arithmetic (MFU).

    completions, prompts: tokens over all ranks, a group's prompt counted once.
    """
    seconds = {name.removeprefix("time/"): value for name, value in metrics.items() if name.startswith("time/")}
    passes = {name: float(res.config.grpo.num_iterations) if name == "update" else 1.0 for name in speed.WORKING}
    found = speed.speeds(seconds, metrics["step_time"], {name: n * completions for name, n in passes.items()})
    peak = res.engine.peak_flops()
    if peak is None:
        return found
    through = {name: n * (completions + prompts) for name, n in passes.items()}
    return found | speed.utilisation(
        res.engine.num_matrix_parameters, not res.engine.has_frozen, through, seconds, peak * collectives.world_size()
    )


def sum_pairs(pairs: Pairs) -> Pairs:
    """Both halves of every pair summed over all ranks, in one collective; every rank has the same names."""
    names = sorted(pairs)
    flat = collectives.all_reduce_sum([number for name in names for number in pairs[name]])
    return {name: (flat[2 * index], flat[2 * index + 1]) for index, name in enumerate(names)}


def extremes(minima: dict[str, float], maxima: dict[str, float]) -> dict[str, float]:
    """The smallest and the largest of every value over all ranks, in one collective; every rank has the same names.

    A name without a finite value on any rank is left out.
    """
    lowest, highest = sorted(minima), sorted(maxima)
    signed = [-minima[name] for name in lowest] + [maxima[name] for name in highest]
    found = collectives.all_reduce_max(signed)
    values = [-value for value in found[: len(lowest)]] + found[len(lowest) :]
    return {name: value for name, value in zip(lowest + highest, values, strict=True) if math.isfinite(value)}
