"""Source `value_heads`: how far heads trained on the run's own rewards disagree about success.

CDE's critic (Dai et al., arXiv 2509.09675), with linear heads on the policy's hidden states as in epinets (Osband et
al., arXiv 2107.08924): bootstrapped, they agree where completions of this kind were seen often.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


def features(states: Tensor) -> Tensor:
    """(B, D) hidden states to (B, D + 1) float64: scaled to a mean square of 1, and a constant."""
    h = states.double()
    h = h / h.square().mean(1, keepdim=True).add(1e-12).sqrt()
    return torch.cat([h, torch.ones(len(h), 1, dtype=torch.float64)], 1)


def value_heads(states: Tensor, weights: Tensor) -> Tensor:
    """(B,): the standard deviation (ddof 1) of the heads' predictions of the task reward. weights: (K, D + 1)."""
    return (features(states) @ weights.T).std(1).float()


def gradient(states: Tensor, rewards: Tensor, kept: Tensor, weights: Tensor) -> Tensor:
    """(K, D + 1), of each head's mean of (w·h - r)²/2 over its own share of the completions.

    rewards: (B,), NaN where there is none. kept: (B, K) bool, the completions of each head's bootstrap share.
    """
    h, known = features(states), ~rewards.isnan()
    mask = (kept & known[:, None]).double()
    error = (h @ weights.T - rewards.double().nan_to_num(nan=0.0)[:, None]) * mask  # (B, K)
    return (error.T @ h) / mask.sum(0).clamp_min(1.0)[:, None]


class Heads:
    """The heads and their Adam state: the same on every rank."""

    def __init__(self, learning_rate: float) -> None:
        self._rate, self._steps = learning_rate, 0
        self.weights: Tensor | None = None
        """(K, D + 1) float64; None before `start`."""
        self._first: Tensor | None = None
        self._second: Tensor | None = None
        self._gradient: Tensor | None = None

    def start(self, uniforms: Tensor) -> None:
        """New heads from uniforms (K, D + 1) in [0, 1): uniform around 0 with variance 1/(D + 1)."""
        self.weights = (uniforms - 0.5) * math.sqrt(12.0 / uniforms.shape[1])
        self._first, self._second = torch.zeros_like(uniforms), torch.zeros_like(uniforms)

    def take(self, step_gradient: Tensor) -> None:
        """The step's gradient over all ranks. It moves the heads once `commit` is called, unless it has a NaN."""
        self._gradient = step_gradient if bool(step_gradient.isfinite().all()) else None

    def commit(self) -> None:
        """The step is done: one step of Adam (Kingma and Ba, 2015)."""
        if self._gradient is None or self.weights is None or self._first is None or self._second is None:
            return
        self._steps += 1
        self._first = BETA_1 * self._first + (1 - BETA_1) * self._gradient
        self._second = BETA_2 * self._second + (1 - BETA_2) * self._gradient.square()
        size = (self._second / (1 - BETA_2**self._steps)).sqrt() + EPSILON
        self.weights = self.weights - self._rate * self._first / (1 - BETA_1**self._steps) / size
        self._gradient = None

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "first": self._first, "second": self._second, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights, self._first, self._second = state["weights"], state["first"], state["second"]
        self._steps, self._gradient = state["steps"], None
