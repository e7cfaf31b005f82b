"""Learning rate, clipping and AdamW in float64, from docs/audit.md and Loshchilov & Hutter 2019."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

CLIP_EPSILON = 1e-6
"""DeepSpeed adds it to the norm that divides."""


def learning_rate(step: int, peak: float, warmup: int, schedule: str, steps: int) -> float:
    """The rate at a step, from 0: (step + 1)/warmup of the peak at first, then constant, linear or cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    gone = (step - warmup) / max(steps - warmup, 1)
    if schedule == "linear":
        return peak * (1.0 - gone)
    if schedule == "cosine":
        return peak * (1.0 + math.cos(math.pi * gone)) / 2.0
    return peak


def norm_of(gradients: Iterable[Tensor]) -> float:
    """Euclidean norm over all of them."""
    return math.sqrt(sum(float(gradient.detach().double().square().sum()) for gradient in gradients))


def spacing_of(weights: Iterable[Tensor]) -> float:
    """Norm over all weights of the distance to the next float32: an update is rounded by as much, once by the decay and
    once by the step, half a distance each."""
    each = (weight.detach().float().abs() for weight in weights)
    return norm_of(torch.nextafter(weight, torch.full_like(weight, torch.inf)) - weight for weight in each)


def clip_factor(norm: float, longest: float) -> float:
    """The factor on the gradient; 1 when it is short enough, or is not clipped (0)."""
    return min(1.0, longest / (norm + CLIP_EPSILON)) if longest > 0 else 1.0


@dataclass
class AdamW:
    """Moments by parameter name, and the number of updates made."""

    betas: tuple[float, float]
    epsilon: float
    decay: float
    count: int = 0
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)

    def update(self, weights: dict[str, Tensor], gradients: dict[str, Tensor], rate: float) -> None:
        """One step, in place. Matrices decay by 1 - rate·decay first; vectors do not."""
        self.count += 1
        b1, b2 = self.betas
        for name, gradient in gradients.items():
            weight = weights[name]
            zero = torch.zeros_like(weight)
            self.first[name] = b1 * self.first.get(name, zero) + (1 - b1) * gradient
            self.second[name] = b2 * self.second.get(name, zero) + (1 - b2) * gradient**2
            mean = self.first[name] / (1 - b1**self.count)
            square = self.second[name] / (1 - b2**self.count)
            if weight.dim() > 1:
                weight.mul_(1.0 - rate * self.decay)
            weight.sub_(rate * mean / (square.sqrt() + self.epsilon))
