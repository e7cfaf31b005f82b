"""The losses as their papers write them: float64 loops over the tokens, value and gradient."""

from __future__ import annotations

from typing import Any

import numpy as np

from vdr_cli.grpo.losses import LossSettings

B, T, T_MAX = 8, 6, 9


def make(seed: int = 0) -> dict[str, np.ndarray]:
    """Float64 data whose ratios fall on both sides of every clip."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, B)
    logps = -rng.exponential(1.0, (B, T)) - 0.1
    return {
        "logps": logps,
        "old_logps": logps + rng.normal(0, 0.5, (B, T)),
        "ref_logps": logps + rng.normal(0, 0.4, (B, T)),
        "sampler_logps": logps + rng.normal(0, 0.5, (B, T)),
        "entropy": rng.uniform(0.1, 2.0, (B, T)),
        "advantages": rng.normal(0, 1, (B, 1)).repeat(T, axis=1),
        "mask": np.arange(T)[None] < lengths[:, None],
        "covariant": rng.random((B, T)) < 0.3,
    }


def paper_token(data: dict[str, np.ndarray], b: int, t: int, cfg: LossSettings) -> tuple[float, float]:
    """−J of one token and its derivative by log π, for the losses with a ratio per token."""
    logp, old, advantage = data["logps"][b, t], data["old_logps"][b, t], data["advantages"][b, t]
    ratio = np.exp(logp - old)
    if cfg.loss == "cispo":
        weight = min(ratio, 1 + cfg.epsilon_high)
        return -weight * advantage * logp, -weight * advantage
    if cfg.loss == "sapo":
        tau = cfg.sapo_temperature_positive if advantage > 0 else cfg.sapo_temperature_negative
        gate = 1 / (1 + np.exp(-tau * (ratio - 1)))
        return -4 / tau * gate * advantage, -4 * gate * (1 - gate) * ratio * advantage
    if cfg.loss == "kl_cov":
        sign = cfg.kl_cov_weight * np.sign(logp - old) * data["covariant"][b, t]
        return -ratio * advantage + sign * (logp - old), -ratio * advantage + sign
    if cfg.loss == "clip_cov" and data["covariant"][b, t]:
        return 0.0, 0.0
    return paper_clip(ratio, advantage, ratio, cfg)


def paper_clip(ratio: float, advantage: float, slope: float, cfg: LossSettings) -> tuple[float, float]:
    """−min(min(ρ, δ) A, clip(ρ) A) and its derivative, when dρ = slope."""
    delta = np.inf if cfg.delta is None else cfg.delta
    first = min(ratio, delta) * advantage
    second = min(max(ratio, 1 - cfg.epsilon_low), 1 + cfg.epsilon_high) * advantage
    if first <= second:
        return -first, -advantage * slope if ratio < delta else 0.0
    inside = 1 - cfg.epsilon_low < ratio < 1 + cfg.epsilon_high
    return -second, -advantage * slope if inside else 0.0


def paper_kl(x: float, kind: str) -> tuple[float, float]:
    """Estimate and derivative by log π, x = log π − log π_ref."""
    if kind == "k1":
        return x, 1.0
    if kind == "k2":
        return x * x / 2, x
    return np.exp(-x) - 1 + x, 1 - np.exp(-x)


def paper_weight(loss: str, lengths: np.ndarray, b: int) -> float:
    if loss in ("grpo", "gspo", "sapo"):
        return 1 / len(lengths) / lengths[b]
    if loss == "dr_grpo":
        return 1 / (len(lengths) * T_MAX)
    return 1 / lengths.sum()


def paper_policy_terms(data: dict[str, np.ndarray], cfg: LossSettings) -> tuple[np.ndarray, np.ndarray]:
    """−J per token (B, T) and derivative by log π; GSPO in its sequence form, spread evenly over the tokens."""
    values, gradients = np.zeros((B, T)), np.zeros((B, T))
    for b in range(B):
        valid = [t for t in range(T) if data["mask"][b, t]]
        if cfg.loss == "gspo":
            s = np.exp(sum(data["logps"][b, t] - data["old_logps"][b, t] for t in valid) / len(valid))
            value, gradient = paper_clip(s, data["advantages"][b, 0], s, cfg)
            for t in valid:
                values[b, t], gradients[b, t] = value, gradient
            continue
        for t in valid:
            values[b, t], gradients[b, t] = paper_token(data, b, t, cfg)
    return values, gradients


def paper_loss(data: dict[str, np.ndarray], cfg: LossSettings, selected: np.ndarray | None = None) -> tuple[float, Any]:
    """The step's loss and its gradient by log π, (B, T)."""
    lengths = data["mask"].sum(1)
    values, gradients = paper_policy_terms(data, cfg)
    loss, gradient = 0.0, np.zeros((B, T))
    for b in range(B):
        for t in range(T):
            if not data["mask"][b, t]:
                continue
            factor = 1.0 if selected is None else float(selected[b, t])
            if cfg.importance_cap is not None:
                factor *= min(np.exp(data["old_logps"][b, t] - data["sampler_logps"][b, t]), cfg.importance_cap)
            value, slope = factor * values[b, t], factor * gradients[b, t]
            if cfg.beta and cfg.kl_in == "loss":
                kl, kl_slope = paper_kl(data["logps"][b, t] - data["ref_logps"][b, t], cfg.kl)
                value, slope = value + cfg.beta * kl, slope + cfg.beta * kl_slope
            weight = paper_weight(cfg.loss, lengths, b)
            loss += weight * value - cfg.entropy_weight * data["entropy"][b, t] / lengths.sum()
            gradient[b, t] = weight * slope
    return loss, gradient
