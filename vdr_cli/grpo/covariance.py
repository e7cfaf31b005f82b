"""The tokens whose updates cost the most entropy: losses clip_cov and kl_cov (Cui et al. 2025, arXiv 2505.22617).

A policy-gradient step changes the policy's entropy by minus the covariance of log-probability and advantage, and a few
tokens carry most of it. Both losses treat those tokens differently. Pure functions of one optimizer step's tokens,
over all ranks: vectors (N,) in one order on every rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def covariances(advantages: Tensor, logps: Tensor, mean_advantage: float, mean_logp: float) -> Tensor:
    """cov_t = (A_t − mean A)(log π_t − mean log π), float64, in the shape of the arguments.

    The means are those of the whole optimizer step's tokens, over all ranks.
    """
    return (advantages.double() - mean_advantage) * (logps.double() - mean_logp)


def highest(covariance: Tensor, share: float) -> Tensor:
    """(N,) bool: the `share` of tokens with the highest covariance, at least one; KL-Cov. Of equals the first."""
    chosen = torch.zeros(len(covariance), dtype=torch.bool)
    order = covariance.argsort(descending=True, stable=True)
    chosen[order[: _count(share, len(covariance))]] = True
    return chosen


def drawn(covariance: Tensor, uniforms: Tensor, share: float, low: float, high: float) -> Tensor:
    """(N,) bool: a `share` of all tokens, at least one, drawn from those with covariance in (low, high); Clip-Cov.

    uniforms: (N,) float64, a random number for each token; the candidates with the smallest are drawn.
    """
    candidates = (covariance > low) & (covariance < high)
    order = torch.where(candidates, uniforms, torch.inf).argsort(stable=True)
    chosen = torch.zeros(len(covariance), dtype=torch.bool)
    chosen[order[: _count(share, len(covariance))]] = True
    return chosen & candidates


def _count(share: float, tokens: int) -> int:
    """⌊share · N⌋, and at least one, as in the authors' code."""
    return max(int(share * tokens), 1)
