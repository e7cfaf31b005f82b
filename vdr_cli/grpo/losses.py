"""The policy losses: per-token terms by variant, weights by aggregation, and the sum of their products.

An optimizer step's loss is Σ over micro-batches and ranks of Σ_{b,t} w_{b,t} · l_{b,t}. The weights hold the
denominator, which is that of the WHOLE step (`Totals`), so the same data give the same gradient however
they are split. docs/losses.md has the formulas side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Totals:
    """The denominators: sums over all micro-batches and ranks of a step, known before its first backward."""

    completions: float
    """All of the step's completions, those with no valid token included."""
    tokens: float
    """Valid tokens: True in the loss mask."""


@dataclass(frozen=True)
class LossSettings:
    """The settings of a loss; the defaults are those of `grpo` in docs/configuration.md."""

    loss: str = "dapo"
    """Name of a variant in VARIANTS."""
    epsilon_low: float = 0.2
    epsilon_high: float = 0.28
    """The ratio is clipped to [1 − epsilon_low, 1 + epsilon_high]."""
    delta: float | None = None
    """Cap of the ratio in the unclipped term; None: none."""
    sapo_temperature_positive: float = 1.0
    sapo_temperature_negative: float = 1.05
    kl_cov_weight: float = 1.0
    """Weight of |log ρ| on kl_cov's tokens."""
    beta: float = 0.0
    """Weight of the KL to the reference model."""
    kl: str = "k3"
    kl_in: str = "loss"
    """The place of the KL: loss or reward."""
    entropy_weight: float = 0.0
    router_aux_loss_coef: float = 0.0
    """Weight of the load-balancing loss of a mixture of experts."""
    importance_cap: float | None = None
    """Cap of π_old/π_sampler; None: no correction."""


@dataclass(frozen=True)
class LossInputs:
    """Numbers of some rows' tokens that stay as they are while the policy moves. None: the loss does not need them."""

    advantages: Tensor  # (B,) or (B, T)
    mask: Tensor  # (B, T) bool, the loss mask
    old_logps: Tensor | None = None
    """(B, T) under the policy that the rollout began with; None: the policy has not moved since."""
    ref_logps: Tensor | None = None  # (B, T), of the reference model
    sampler_logps: Tensor | None = None  # (B, T), of the program that drew the tokens; NaN: unknown
    selected: Tensor | None = None  # (B, T) bool, tokens whose policy term counts; None: all
    covariant: Tensor | None = None  # (B, T) bool, tokens that clip_cov and kl_cov treat differently
    weights: Tensor | None = None  # (B, T), of token_weights; `policy_loss` needs them
    entropy_weights: Tensor | None = None  # (B, T), token_weights("dapo", ...): mean over the step's tokens

    def map(self, function: Callable[[Tensor], Tensor]) -> LossInputs:
        """The same with `function` applied to every tensor."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(self, **{name: function(value) for name, value in given.items() if value is not None})


class PolicyOutputs(NamedTuple):
    """One forward pass of the policy over these rows, with gradient."""

    logps: Tensor  # (B, T)
    entropy: Tensor | None = None  # (B, T), with gradient when it is rewarded
    router_balance: Tensor | None = None  # (), the load-balancing loss of a mixture of experts


@dataclass
class LossOutput:
    """The micro-batch's share of the step's loss, and metrics to add up."""

    loss: Tensor  # ()
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """name → (numerator, denominator): add both over micro-batches and ranks, then divide."""
    minima: dict[str, Tensor] = field(default_factory=dict)
    """name → smallest value, inf where there is none: take the minimum over micro-batches and ranks."""
    maxima: dict[str, Tensor] = field(default_factory=dict)
    """name → largest value, −inf where there is none: take the maximum over micro-batches and ranks."""


class TokenLoss(NamedTuple):
    """A variant's per-token term and the tokens whose ratio was clipped (both (B, T); None: it does not clip)."""

    value: Tensor
    clipped_low: Tensor | None = None
    clipped_high: Tensor | None = None


class Terms(NamedTuple):
    """The parts of a variant's per-token term, each (B, T)."""

    logps: Tensor
    log_ratio: Tensor  # log π(y_t) − log π_old(y_t); 0 at padding
    advantages: Tensor
    mask: Tensor  # bool
    covariant: Tensor | None = None  # bool


# ---- per-token terms ----------------------------------------------------------------------------------------


def clipped_surrogate(terms: Terms, settings: LossSettings) -> TokenLoss:
    """−min(ρ A, clip(ρ, 1−ε_low, 1+ε_high) A), ρ = π/π_old. PPO (Schulman et al. 2017), GRPO (Shao et al. 2024);
    ε_high > ε_low is clip-higher (DAPO, Yu et al. 2025); δ caps ρ in the first term, which matters for
    A < 0 (two-sided clipping, INTELLECT-2, 2025).
    """
    return _clipped(torch.exp(terms.log_ratio), terms.advantages, settings)


def gspo_surrogate(terms: Terms, settings: LossSettings) -> TokenLoss:
    """−min(s_t A_t, clip(s_t, 1−ε_low, 1+ε_high) A_t), s_t = sg[s] · π_t/sg[π_t], s = exp(mean_t log ρ_t).

    GSPO-token (Zheng et al. 2025, eq. 13-14): the value and, with one advantage per completion, the gradient
    of GSPO's sequence-level −min(s A, clip(s) A); it also takes an advantage per token.
    """
    mask = terms.mask.to(terms.log_ratio.dtype)
    length = mask.sum(dim=1, keepdim=True).clamp_min(1.0)
    log_s = (terms.log_ratio * mask).sum(dim=1, keepdim=True) / length  # (B, 1)
    return _clipped(torch.exp(log_s.detach() + terms.logps - terms.logps.detach()), terms.advantages, settings)


def cispo_surrogate(terms: Terms, settings: LossSettings) -> TokenLoss:
    """−sg[min(ρ, 1+ε_high)] A log π. CISPO (MiniMax-M1, 2025, eq. 4-5): the weight is clipped, the gradient never;
    as in the paper's runs there is no lower bound.
    """
    ratio = torch.exp(terms.log_ratio).detach()
    value = -ratio.clamp(max=1.0 + settings.epsilon_high) * terms.advantages * terms.logps
    return TokenLoss(value, torch.zeros_like(terms.mask), ratio > 1.0 + settings.epsilon_high)


def sapo_surrogate(terms: Terms, settings: LossSettings) -> TokenLoss:
    """−(4/τ) σ(τ(ρ − 1)) A with τ = τ_pos where A > 0 and τ_neg elsewhere: a soft gate in place of the clip.
    SAPO (Gao et al. 2025).
    """
    ratio = torch.exp(terms.log_ratio)
    positive = torch.full_like(ratio, settings.sapo_temperature_positive)
    tau = torch.where(terms.advantages > 0, positive, settings.sapo_temperature_negative)
    return TokenLoss(-torch.sigmoid(tau * (ratio - 1.0)) * 4.0 / tau * terms.advantages)


def clip_cov_surrogate(terms: Terms, settings: LossSettings) -> TokenLoss:
    """The clipped surrogate without the covariant tokens: their term, and so their gradient, is 0.

    Clip-Cov (Cui et al. 2025); grpo/covariance.py chooses the tokens.
    """
    surrogate = clipped_surrogate(terms, settings)
    return surrogate._replace(value=_where(~_required(terms.covariant, "covariant"), surrogate.value))


def kl_cov_surrogate(terms: Terms, settings: LossSettings) -> TokenLoss:
    """−ρ A, and −ρ A + c |log ρ| on the covariant tokens: nothing is clipped. KL-Cov (Cui et al. 2025), with
    |log ρ| for the KL as in the authors' code.
    """
    value = -torch.exp(terms.log_ratio) * terms.advantages
    penalty = _where(_required(terms.covariant, "covariant"), terms.log_ratio.abs())
    return TokenLoss(value + settings.kl_cov_weight * penalty)


def _clipped(ratio: Tensor, advantages: Tensor, settings: LossSettings) -> TokenLoss:
    low, high = 1.0 - settings.epsilon_low, 1.0 + settings.epsilon_high
    capped = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
    value = -torch.min(capped * advantages, ratio.clamp(low, high) * advantages)
    return TokenLoss(value, (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0))


# ---- aggregations: w (B, T) so that the step's loss is Σ w · l -------------------------------------------------


def mean_of_means(mask: Tensor, totals: Totals, max_new_tokens: int) -> Tensor:
    """1/(B |y_b|): the mean over completions of each one's token mean (GRPO, GSPO, SAPO)."""
    length = mask.sum(dim=1, keepdim=True).clamp_min(1.0)
    return mask / (length * max(totals.completions, 1.0))


def constant_length(mask: Tensor, totals: Totals, max_new_tokens: int) -> Tensor:
    """1/(B T_max): no length bias (Dr. GRPO, Liu et al. 2025)."""
    return mask / (max(totals.completions, 1.0) * max_new_tokens)


def token_mean(mask: Tensor, totals: Totals, max_new_tokens: int) -> Tensor:
    """1/Σ_b |y_b|: every token of the step weighs the same (DAPO, CISPO)."""
    return mask / max(totals.tokens, 1.0)


class Variant(NamedTuple):
    token_loss: Callable[[Terms, LossSettings], TokenLoss]
    aggregation: Callable[[Tensor, Totals, int], Tensor]


VARIANTS: dict[str, Variant] = {
    "grpo": Variant(clipped_surrogate, mean_of_means),
    "dr_grpo": Variant(clipped_surrogate, constant_length),
    "dapo": Variant(clipped_surrogate, token_mean),
    "cispo": Variant(cispo_surrogate, token_mean),
    "gspo": Variant(gspo_surrogate, mean_of_means),
    "sapo": Variant(sapo_surrogate, mean_of_means),
    "clip_cov": Variant(clip_cov_surrogate, token_mean),
    "kl_cov": Variant(kl_cov_surrogate, token_mean),
}


def loss_mask(policy_mask: Tensor, truncated: Tensor, mask_truncated: bool) -> Tensor:
    """(B, T) bool: the policy's tokens; none of truncated completions when these are masked (DAPO)."""
    return policy_mask & ~truncated[:, None] if mask_truncated else policy_mask


def token_weights(
    loss: str, mask: Tensor, totals: Totals, max_new_tokens: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(B, T) weights of the loss's aggregation, 0 at padding."""
    return VARIANTS[loss].aggregation(mask.to(dtype), totals, max_new_tokens)


# ---- KL, sampler correction, entropy selection ----------------------------------------------------------------


def kl_estimate(log_ratio: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(π ‖ π_ref) from log_ratio = log π − log π_ref of a token drawn from π (Schulman 2020).

    k1 = x; k2 = x²/2; k3 = e^{−x} + x − 1, never clamped. As a loss their gradients are different things:
    k1's has mean zero; k2's is that of KL(π ‖ π_ref); k3's is that of KL(π_ref ‖ π) (Tang & Munos 2025).
    """
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"unknown KL estimator {kind!r}: k1, k2 or k3")


def kl_penalised_rewards(
    rewards: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float, kind: str
) -> Tensor:
    """rewards (B,) − β Σ_t kl_t: the KL in the reward, whose policy gradient with k1 is exactly β ∇KL(π ‖ π_ref)."""
    kl = kl_estimate(_where(mask, logps - ref_logps), kind)
    return rewards - beta * _where(mask, kl).sum(dim=1)


def sampler_weights(old_logps: Tensor, sampler_logps: Tensor, mask: Tensor, cap: float) -> Tensor:
    """(B, T): min(π_old/π_sampler, cap), 1 where the sampler's log-probability is unknown (NaN) or at padding.

    Truncated importance sampling (Yao et al. 2025) for a sampler whose numbers differ from the trainer's.
    """
    difference = _where(mask, old_logps - sampler_logps).nan_to_num(nan=0.0)
    return torch.exp(difference).clamp(max=cap).detach()


def entropy_threshold(entropies: Tensor, share: float) -> float:
    """The entropy that the `share` of tokens with the highest entropy reaches; entropies: the whole step's valid
    tokens, (N,), over all ranks. −inf when there are none. (Wang et al. 2025, "Beyond the 80/20 rule".)
    """
    if entropies.numel() == 0 or share >= 1.0:
        return -torch.inf
    count = max(round(share * entropies.numel()), 1)
    return float(entropies.flatten().kthvalue(entropies.numel() - count + 1).values)


# ---- the loss -------------------------------------------------------------------------------------------------


def policy_loss(policy: PolicyOutputs, inputs: LossInputs, settings: LossSettings) -> LossOutput:
    """Σ_{b,t} w · (policy term + β KL) − c · entropy + a · load balance, and its metrics.

    Padding is replaced before it is weighed, so nothing there can spread.
    """
    logps, mask = policy.logps, inputs.mask.bool()
    old_logps = logps.detach() if inputs.old_logps is None else inputs.old_logps
    advantages = inputs.advantages if inputs.advantages.dim() == 2 else inputs.advantages[:, None]
    terms = Terms(
        logps=_where(mask, logps),
        log_ratio=_where(mask, logps - old_logps),
        advantages=_where(mask, advantages.to(logps.dtype).expand_as(logps)),
        mask=mask,
        covariant=inputs.covariant,
    )
    token_loss = VARIANTS[settings.loss].token_loss(terms, settings)
    value = token_loss.value
    if inputs.selected is not None:
        value = _where(inputs.selected, value)
    if inputs.sampler_logps is not None and settings.importance_cap is not None:
        value = value * sampler_weights(old_logps, inputs.sampler_logps, mask, settings.importance_cap)
    if settings.beta != 0.0 and settings.kl_in == "loss":
        value = value + settings.beta * kl_estimate(
            _where(mask, logps - _required(inputs.ref_logps, "ref_logps")), settings.kl
        )
    loss = (_required(inputs.weights, "weights") * _where(mask, value)).sum()
    if settings.entropy_weight != 0.0:
        bonus = _required(policy.entropy, "entropy") * _required(inputs.entropy_weights, "entropy_weights")
        loss = loss - settings.entropy_weight * _where(mask, bonus).sum()
    if settings.router_aux_loss_coef != 0.0:  # weighted by the micro-batch's share of the step's tokens
        share = _required(inputs.entropy_weights, "entropy_weights").sum()
        loss = loss + settings.router_aux_loss_coef * share * _required(policy.router_balance, "router_balance")
    means = _metrics(policy, inputs, terms, token_loss, old_logps, settings)
    return LossOutput(loss, means, *_extremes(inputs, terms, token_loss, old_logps, settings))


@torch.no_grad()
def _metrics(
    policy: PolicyOutputs,
    inputs: LossInputs,
    terms: Terms,
    token_loss: TokenLoss,
    old_logps: Tensor,
    settings: LossSettings,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Token means, as (sum, count) pairs; names as TRL's."""
    mask = terms.mask
    count = mask.sum().float()
    metrics = {"ratio/mean": (_where(mask, torch.exp(terms.log_ratio)).sum(), count)}
    if token_loss.clipped_low is not None and token_loss.clipped_high is not None:
        low, high = token_loss.clipped_low & mask, token_loss.clipped_high & mask
        metrics["clip_ratio/low_mean"] = (low.sum().float(), count)
        metrics["clip_ratio/high_mean"] = (high.sum().float(), count)
        metrics["clip_ratio/region_mean"] = ((low | high).sum().float(), count)
    if inputs.covariant is not None:
        metrics["covariance/share"] = ((inputs.covariant & mask).sum().float(), count)
    if policy.entropy is not None:
        metrics["entropy"] = (_where(mask, policy.entropy).sum(), count)
    if policy.router_balance is not None:
        metrics["aux_loss"] = (policy.router_balance * count, count)
    if inputs.ref_logps is not None:
        kl = kl_estimate(_where(mask, policy.logps - inputs.ref_logps), settings.kl)
        metrics["kl"] = (_where(mask, kl).sum(), count)
    if inputs.sampler_logps is not None:
        known = mask & ~inputs.sampler_logps.isnan()
        difference = _where(known, old_logps - inputs.sampler_logps)
        known_count = known.sum().float()
        metrics["sampling/sampling_logp_difference/mean"] = (difference.abs().sum(), known_count)
        ratio = _where(known, difference.exp())
        if settings.importance_cap is not None:
            ratio = ratio.clamp(max=settings.importance_cap)
        metrics["sampling/importance_sampling_ratio/mean"] = (ratio.sum(), known_count)
    return metrics


@torch.no_grad()
def _extremes(
    inputs: LossInputs, terms: Terms, token_loss: TokenLoss, old_logps: Tensor, settings: LossSettings
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Smallest and largest values, over valid tokens or over completions; names as TRL's."""
    mask, minima = terms.mask, {}
    maxima = {"ratio/max": _largest(torch.exp(terms.log_ratio), mask)}
    if token_loss.clipped_low is not None and token_loss.clipped_high is not None:
        length = mask.sum(dim=1)
        low, high = ((flags & mask).sum(dim=1) / length for flags in (token_loss.clipped_low, token_loss.clipped_high))
        minima["clip_ratio/low_min"] = -_largest(-low, length > 0)
        maxima["clip_ratio/high_max"] = _largest(high, length > 0)
    if inputs.sampler_logps is not None:
        known = mask & ~inputs.sampler_logps.isnan()
        difference = _where(known, old_logps - inputs.sampler_logps)
        ratio = difference.exp().clamp(max=torch.inf if settings.importance_cap is None else settings.importance_cap)
        maxima["sampling/sampling_logp_difference/max"] = _largest(difference.abs(), known)
        maxima["sampling/importance_sampling_ratio/max"] = _largest(ratio, known)
        minima["sampling/importance_sampling_ratio/min"] = -_largest(-ratio, known)
    return minima, maxima


def _largest(values: Tensor, where: Tensor) -> Tensor:
    """The largest of these values, (); −inf where there is none."""
    return torch.where(where, values, -torch.inf).amax()


def _where(mask: Tensor, values: Tensor) -> Tensor:
    """values where mask is True, 0 elsewhere, also where they are NaN or infinite there; the same for gradients."""
    return torch.where(mask, values, values.new_zeros(()))


def _required(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"the configured loss needs {name}")
    return tensor
