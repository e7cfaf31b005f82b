"""Source `novelty`: an elliptical bonus of hidden states (Tuyls et al., arXiv 2510.11686)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def novelty(states: Tensor, projection: Tensor, group_size: int, ridge: float = 0.01) -> Tensor:
    """(B,) in [0, 1): h' (λI + Σ_group h h')^-1 h, h the projected state less its group's mean; in float64.

    states: (B, D), the mean of the last hidden states of each completion's tokens under the frozen starting model.
    projection: (D, d), see `sparse_projection`. ridge: λ, 0.01 in the authors' code, whose reward_type is `leverage`.
    With fewer directions than d in a group and λ near 0 every completion gets 1 - 1/G.
    """
    h = (states.double() @ projection.double()).view(-1, group_size, projection.shape[1])
    h = h - h.mean(1, keepdim=True)
    covariance = h.transpose(1, 2) @ h + ridge * torch.eye(h.shape[2], dtype=torch.float64)
    solved: Tensor = torch.linalg.solve(covariance, h.transpose(1, 2))
    return (h * solved.transpose(1, 2)).sum(2).flatten().float()


def sparse_projection(uniforms: Tensor) -> Tensor:
    """(D, d) float64 from uniforms (D, d) in [0, 1): ±1/sqrt(p d) with probability p/2 each, else 0; p = 1/sqrt(D).

    Li, Hastie and Church (2006), as in the authors' code; a new one each step.
    """
    D, d = uniforms.shape
    p = 1.0 / math.sqrt(D)
    signs = (uniforms < p / 2).double() - ((uniforms >= p / 2) & (uniforms < p)).double()
    return signs / math.sqrt(p * d)
