"""A rollout's optimizer steps again, in float64: loss, gradient, clipping, AdamW, and the numbers logged of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vdr_cli.audit import losses, model, optimizer, streams
from vdr_cli.config import Config, GrpoConfig

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Given:
    """Inputs of the update. Arrays are (B, T), 0 at padding."""

    prompts: Sequence[Sequence[int]]
    completions: Sequence[Sequence[int]]
    advantages: Array
    trained: Flags
    sampler_logps: Array
    logps: Array
    """On file, before the first update."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus with entropy_target."""
    ref_logps: Array | None = None
    selected: Flags | None = None


@dataclass
class Outcome:
    """The outcome of the steps; sums and counts over all of them."""

    loss: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    minima: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    norm: float = 0.0
    """Norm of the last step's gradient, before clipping."""
    norms: list[float] = field(default_factory=list)
    denominators: list[losses.Denominators] = field(default_factory=list)
    """One entry per step."""

    def add(self, name: str, values: Tensor) -> None:
        """Count these values into a mean."""
        self.sums[name] = self.sums.get(name, 0.0) + float(values.double().sum())
        self.counts[name] = self.counts.get(name, 0.0) + values.numel()

    def reach(self, name: str, values: Tensor) -> None:
        """Count these values into a maximum."""
        if values.numel():
            self.maxima[name] = max(self.maxima.get(name, -math.inf), float(values.max()))

    def sink(self, name: str, values: Tensor) -> None:
        """Count these values into a minimum."""
        if values.numel():
            self.minima[name] = min(self.minima.get(name, math.inf), float(values.min()))

    def means(self) -> dict[str, float]:
        """The logged means; none where nothing was counted."""
        return {name: total / self.counts[name] for name, total in self.sums.items() if self.counts[name]}

    def mean_denominators(self) -> dict[str, float]:
        """The logged means over the steps."""
        count = len(self.denominators)
        return {
            "denominator/completions": sum(each.completions for each in self.denominators) / count,
            "denominator/tokens": sum(each.tokens for each in self.denominators) / count,
        }


def settings_of(cfg: Config, entropy_coefficient: float) -> GrpoConfig:
    """`grpo` with what follows from elsewhere.

    Completions of older weights or of members bring a cap (docs/rollout.md), entropy_target a weight of the entropy
    (docs/losses.md).
    """
    changed: dict[str, float] = {}
    if cfg.grpo.importance_cap is None and (cfg.rollout.ahead or cfg.rollout.members):
        changed["importance_cap"] = 2.0
    if cfg.grpo.entropy_target is not None:
        changed["entropy_weight"] = entropy_coefficient
    return cfg.grpo.model_copy(update=changed)


def make(
    policy: nn.Module,
    weights: dict[str, Tensor],
    adam: optimizer.AdamW,
    given: Given,
    cfg: Config,
    step: int,
    dtype: str,
) -> Outcome:
    """A rollout's updates from these weights (float64, changed in place), with what they log."""
    outcome = Outcome()
    model.put(policy, weights, dtype)
    old, _ = model.token_numbers(policy, given.prompts, given.completions, cfg.rollout.temperature)
    train = cfg.train
    for update, rows in enumerate(minibatches(len(given.prompts), cfg) * cfg.grpo.num_iterations):
        model.put(policy, weights, dtype)
        policy.zero_grad(set_to_none=True)
        covariant = covariant_tokens(given, rows, cfg, step + update)
        _backward(policy, given, rows, cfg, torch.from_numpy(old), covariant, outcome)
        found = {name: p.grad for name, p in model.trained(policy).items() if p.grad is not None}
        outcome.norm = optimizer.norm_of(found.values())
        outcome.norms.append(outcome.norm)
        factor = optimizer.clip_factor(outcome.norm, train.max_grad_norm)
        rate = optimizer.learning_rate(
            step + update, train.learning_rate, train.warmup_steps, train.lr_schedule, train.steps
        )
        everything = {name: found.get(name, torch.zeros_like(weight)) * factor for name, weight in weights.items()}
        with torch.no_grad():
            adam.update(weights, everything, rate)
    policy.zero_grad(set_to_none=True)
    return outcome


def minibatches(rows: int, cfg: Config) -> list[list[int]]:
    """The rows of each optimizer step: group g of the rollout is in minibatch g mod grpo.minibatches."""
    parts, G = cfg.grpo.minibatches, cfg.rollout.group_size
    return [[row for row in range(rows) if row // G % parts == part] for part in range(parts)]


def covariant_tokens(given: Given, rows: Sequence[int], cfg: Config, step: int) -> Flags | None:
    """(B, T) the tokens of this optimizer step that its loss singles out; None for losses that do not.

    From the log-probabilities on file, so that rounding moves no token over a threshold.
    """
    if cfg.grpo.loss not in ("clip_cov", "kl_cov"):
        return None
    on = given.trained[rows]
    T = on.shape[1]
    uniforms = np.stack([streams.clipped_uniforms(cfg.train.seed, step, row, T) for row in rows])
    advantages, logps, numbers = (array[on].tolist() for array in (given.advantages[rows], given.logps[rows], uniforms))
    found = np.zeros_like(given.trained)
    part = np.zeros_like(on)
    part[on] = losses.covariant_tokens(advantages, logps, numbers, cfg.grpo)
    found[rows] = part
    return found


def _backward(
    policy: nn.Module,
    given: Given,
    chosen: Sequence[int],
    cfg: Config,
    old_logps: Tensor,
    covariant: Flags | None,
    outcome: Outcome,
) -> None:
    """The gradient of one optimizer step on the chosen rows. old_logps: (B, T) before the rollout's first update."""
    settings = settings_of(cfg, given.entropy_coefficient)
    totals = losses.Denominators(len(chosen), int(given.trained[chosen].sum()))
    outcome.denominators.append(totals)
    for rows in model.alike(given.prompts, given.completions, chosen):
        logps, entropy = model.logps_and_entropies(
            policy, given.prompts, given.completions, rows, cfg.rollout.temperature
        )
        share = torch.zeros((), dtype=torch.float64)
        for index, number in enumerate(rows):
            row = _row(given, number, logps[index], entropy[index], old_logps[number, : logps.shape[1]])
            if covariant is not None:
                row = replace(row, covariant=torch.from_numpy(covariant[number, : logps.shape[1]]))
            terms = losses.policy_terms(row, settings)
            share = share + losses.row_loss(row, terms, settings, totals, cfg.rollout.completion_tokens)
            _log(outcome, row, terms, settings)
        outcome.loss += float(share.detach())
        share.backward()  # type: ignore[no-untyped-call]


def _row(given: Given, number: int, logps: Tensor, entropy: Tensor, old: Tensor) -> losses.Row:
    T = len(logps)

    def cut(values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values[number, :T]))

    return losses.Row(
        logps,
        entropy,
        old,
        cut(given.advantages),
        cut(given.trained),
        cut(given.sampler_logps),
        None if given.ref_logps is None else cut(given.ref_logps),
        None if given.selected is None else cut(given.selected),
    )


@torch.no_grad()
def _log(outcome: Outcome, row: losses.Row, terms: losses.Terms, cfg: GrpoConfig) -> None:
    """One completion's part of the step's metrics, over its trained tokens."""
    on = row.trained
    ratio = torch.exp(row.logps - row.old_logps)[on]
    outcome.add("ratio/mean", ratio)
    outcome.reach("ratio/max", ratio)
    outcome.add("entropy", row.entropy[on])
    if row.covariant is not None:
        outcome.add("covariance/share", row.covariant[on])
    if terms.low is not None and terms.high is not None:
        outcome.add("clip_ratio/low_mean", terms.low[on])
        outcome.add("clip_ratio/high_mean", terms.high[on])
        outcome.add("clip_ratio/region_mean", (terms.low | terms.high)[on])
        if bool(on.any()):  # shares of a completion's tokens
            outcome.sink("clip_ratio/low_min", terms.low[on].double().mean())
            outcome.reach("clip_ratio/high_max", terms.high[on].double().mean())
    if row.ref_logps is not None:
        outcome.add("kl", losses.kl(row.logps, row.ref_logps, cfg.kl)[on])
    known = on & ~row.sampler_logps.isnan()
    difference = (row.old_logps - row.sampler_logps)[known]
    outcome.add("sampling/sampling_logp_difference/mean", difference.abs())
    outcome.reach("sampling/sampling_logp_difference/max", difference.abs())
    cap = cfg.importance_cap
    weight = difference.exp() if cap is None else difference.exp().clamp(max=cap)
    outcome.add("sampling/importance_sampling_ratio/mean", weight)
    outcome.reach("sampling/importance_sampling_ratio/max", weight)
    outcome.sink("sampling/importance_sampling_ratio/min", weight)
