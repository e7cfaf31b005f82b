"""The distribution that a completion was drawn from, and the draw itself, in float64 from docs/rollout.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vdr_cli.config import RolloutConfig

Array = NDArray[np.float64]


def filtered(logits: Array, seen: Sequence[int], cfg: RolloutConfig) -> Array:
    """(V,) scores of the next token: penalty, temperature, top-k, top-p, min-p in this order; -inf: left out."""
    scores = logits.copy()
    if cfg.repetition_penalty != 1.0:
        for token in set(seen):
            value = scores[token]
            scores[token] = value / cfg.repetition_penalty if value > 0 else value * cfg.repetition_penalty
    scores = scores / cfg.temperature
    if cfg.top_k:
        smallest = np.sort(scores)[-min(cfg.top_k, len(scores))]
        scores[scores < smallest] = -np.inf
    if cfg.top_p < 1.0:
        order = np.argsort(-scores, kind="stable")
        probability = _softmax(scores)[order]
        before = np.cumsum(probability) - probability
        scores[order[before >= cfg.top_p]] = -np.inf
    if cfg.min_p > 0:
        probability = _softmax(scores)
        scores[probability < cfg.min_p * probability.max()] = -np.inf
    return scores


def _softmax(scores: Array) -> Array:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


@dataclass(frozen=True)
class Draw:
    """The draw of one token."""

    logp: float
    """Log-probability of the token in the filtered distribution; -inf: it was filtered out."""
    distance: float
    """Distance from the uniform to the token's interval of the cumulative distribution; 0: inside."""


def draw(scores: Array, token: int, uniform: float) -> Draw:
    """Token y is drawn when F(y - 1) ≤ u < F(y), F the cumulative softmax in the vocabulary's order."""
    probability = _softmax(scores)
    lower = float(probability[:token].sum())
    upper = lower + float(probability[token])
    logp = float(np.log(probability[token])) if probability[token] > 0 else -np.inf
    return Draw(logp, max(lower - uniform, uniform - upper, 0.0))
