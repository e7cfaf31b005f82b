"""Source `noise`: a standard normal number per completion. A control: it carries no information."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def noise(uniforms: Tensor) -> Tensor:
    """(B,) float32 from uniforms (B, 2) in [0, 1), by Box and Muller (1958): sqrt(-2 log(1 - u_1))·cos(2π u_2)."""
    radius = (-2.0 * torch.log1p(-uniforms[:, 0])).sqrt()
    return (radius * torch.cos(2.0 * math.pi * uniforms[:, 1])).float()
