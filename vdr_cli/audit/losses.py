"""Policy losses in float64, from docs/losses.md, one completion at a time. Vectors (T,) over its tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdr_cli.config import GrpoConfig

MEAN_OF_MEANS = ("grpo", "gspo", "sapo")
"""Losses whose tokens weigh 1/(B·|y|)."""
TOKEN_MEAN = ("dapo", "cispo", "clip_cov", "kl_cov")
"""Losses whose tokens weigh 1/N."""


@dataclass(frozen=True)
class Denominators:
    """Counts of the whole optimizer step, over all ranks."""

    completions: int
    tokens: int
    """Tokens that give gradient."""


@dataclass(frozen=True)
class Row:
    """One completion. Everything is (T,)."""

    logps: Tensor
    entropy: Tensor
    old_logps: Tensor
    advantages: Tensor
    trained: Tensor
    """Bool: the token gives gradient."""
    sampler_logps: Tensor
    """NaN: unknown."""
    ref_logps: Tensor | None = None
    selected: Tensor | None = None
    """Bool: the token's policy term counts; None: every token's."""
    covariant: Tensor | None = None
    """Bool: the token is one that clip_cov or kl_cov singles out."""


@dataclass(frozen=True)
class Terms:
    """The policy term of each token and the tokens whose ratio is clipped; None: this loss does not clip."""

    value: Tensor
    low: Tensor | None = None
    high: Tensor | None = None


def weight_of(loss: str, length: int, totals: Denominators, longest: int) -> float:
    """The weight of a token of a completion with `length` trained tokens; longest: rollout.max_new_tokens."""
    if loss == "dr_grpo":
        return 1.0 / (totals.completions * longest)
    if loss in MEAN_OF_MEANS:
        return 1.0 / (max(length, 1) * totals.completions)
    if loss in TOKEN_MEAN:
        return 1.0 / max(totals.tokens, 1)
    raise ValueError(f"unknown loss {loss}")


def policy_terms(row: Row, cfg: GrpoConfig) -> Terms:
    """l_t of docs/losses.md and the clipped tokens."""
    A, ratio = row.advantages, torch.exp(row.logps - row.old_logps)
    low, high = 1.0 - cfg.epsilon_low, 1.0 + cfg.epsilon_high
    if cfg.loss == "cispo":
        capped = torch.clamp(ratio.detach(), max=high)
        return Terms(-capped * A * row.logps, torch.zeros_like(row.trained), ratio.detach() > high)
    if cfg.loss == "sapo":
        tau = torch.where(A > 0, cfg.sapo_temperature_positive, cfg.sapo_temperature_negative)
        return Terms(-4.0 / tau * torch.sigmoid(tau * (ratio - 1.0)) * A)
    if cfg.loss == "kl_cov":
        assert row.covariant is not None
        return Terms(-ratio * A + cfg.kl_cov_weight * torch.abs(row.logps - row.old_logps) * row.covariant)
    if cfg.loss == "gspo":
        log_ratio = (row.logps - row.old_logps).detach()[row.trained]
        mean = log_ratio.mean() if len(log_ratio) else torch.zeros((), dtype=torch.float64)
        ratio = torch.exp(mean) * torch.exp(row.logps - row.logps.detach())
    first = ratio if cfg.delta is None else torch.clamp(ratio, max=cfg.delta)
    value = -torch.minimum(first * A, torch.clamp(ratio, low, high) * A)
    if cfg.loss == "clip_cov":
        value = value * ~row.covariant  # type: ignore[operator]
    return Terms(value, (ratio < low) & (A < 0), (ratio > high) & (A > 0))


def kl(logps: Tensor, ref_logps: Tensor, kind: str) -> Tensor:
    """k1, k2 or k3 of x = log π - log π_ref."""
    x = logps - ref_logps
    if kind == "k1":
        return x
    return x**2 / 2.0 if kind == "k2" else torch.exp(-x) + x - 1.0


def row_loss(row: Row, terms: Terms, cfg: GrpoConfig, totals: Denominators, longest: int) -> Tensor:
    """This completion's share of the step's loss."""
    value = terms.value
    if row.selected is not None:
        value = torch.where(row.selected, value, 0.0)
    if cfg.importance_cap is not None:
        difference = torch.nan_to_num(row.old_logps - row.sampler_logps, nan=0.0)
        value = value * torch.clamp(torch.exp(difference), max=cfg.importance_cap)
    if cfg.beta and cfg.kl_in == "loss":
        assert row.ref_logps is not None
        value = value + cfg.beta * kl(row.logps, row.ref_logps, cfg.kl)
    weight = weight_of(cfg.loss, int(row.trained.sum()), totals, longest)
    loss = weight * torch.where(row.trained, value, 0.0).sum()
    entropy = torch.where(row.trained, row.entropy, 0.0).sum() / max(totals.tokens, 1)
    return loss - cfg.entropy_weight * entropy


def covariant_tokens(
    advantages: Sequence[float], logps: Sequence[float], uniforms: Sequence[float], cfg: GrpoConfig
) -> list[bool]:
    """The trained tokens of an optimizer step, in order, that clip_cov or kl_cov singles out (docs/losses.md)."""
    count = len(logps)
    mean_advantage, mean_logp = math.fsum(advantages) / max(count, 1), math.fsum(logps) / max(count, 1)
    covariance = [(a - mean_advantage) * (lp - mean_logp) for a, lp in zip(advantages, logps, strict=True)]
    if cfg.loss == "kl_cov":
        order = sorted(range(count), key=lambda index: -covariance[index])
        special = order[: max(math.floor(cfg.kl_cov_share * count), 1)]
    else:
        within = [index for index in range(count) if cfg.clip_cov_low < covariance[index] < cfg.clip_cov_high]
        order = sorted(within, key=lambda index: uniforms[index])
        special = order[: max(math.floor(cfg.clip_cov_share * count), 1)]
    found = set(special)
    return [index in found for index in range(count)]


def entropy_coefficient(state: dict[str, Any], cfg: GrpoConfig) -> float:
    """Weight of the entropy bonus with entropy_target, from a record's state: 0 above the target."""
    control, target = state.get("entropy") or {}, cfg.entropy_target
    if target is None or control.get("entropy") is None or control["entropy"] > target:
        return 0.0
    return float(control["coefficient"])


def next_coefficient(coefficient: float, entropy: float, cfg: GrpoConfig) -> float:
    """The coefficient after a rollout of this entropy: one step up below the target, one down above it."""
    assert cfg.entropy_target is not None
    moved = coefficient + (cfg.entropy_delta if entropy < cfg.entropy_target else -cfg.entropy_delta)
    return max(0.0, min(moved, cfg.entropy_max))


def selection_threshold(entropies: Sequence[float], share: float) -> float:
    """The entropy that the `share` of the step's trained tokens with the highest entropy reaches."""
    count = max(round(share * len(entropies)), 1)
    return sorted(entropies, reverse=True)[count - 1] if entropies else -float("inf")
