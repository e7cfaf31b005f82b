"""AdamW as the settings ask for it, and the learning rate at each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vdr_cli.config import TrainConfig


def learning_rate_at(step: int, cfg: TrainConfig) -> float:
    """Learning rate of step (from 0): linear warm-up over warmup_steps, then constant, linear or cosine to 0."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(cfg.steps - cfg.warmup_steps, 1)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return cfg.learning_rate * factor[cfg.lr_schedule]


def build_optimizer(policy: nn.Module, cfg: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; fused on a GPU."""
    return torch.optim.AdamW(
        decay_groups([p for p in policy.parameters() if p.requires_grad], cfg.weight_decay),
        lr=cfg.learning_rate,
        betas=cfg.adam_betas,
        eps=cfg.adam_epsilon,
        fused=device.type == "cuda",
    )


def decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay; norms and biases (one dimension) do not.

    A norm's weight has no reason to be near 0. Partitioned parameters are told apart by their whole shape.
    """
    if weight_decay == 0.0:
        return [{"params": parameters, "weight_decay": 0.0}]
    matrices = [p for p in parameters if dimensions(p) > 1]
    vectors = [p for p in parameters if dimensions(p) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def dimensions(parameter: Tensor) -> int:
    """The number of dimensions of the whole parameter, partitioned or not."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
