"""The parts of an update, on the device: log-probabilities in chunks, losses; values and gradients in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_reference import relative, sibling
from torch import Tensor

from vdr_cli.config import GrpoConfig
from vdr_cli.grpo.advantages import Moments, group_advantages
from vdr_cli.grpo.losses import VARIANTS, PolicyOutputs, entropy_threshold

SHAPES = {
    "plain": {"temperature": 1.0},
    "temperature": {"temperature": 0.7},
    "scaled": {"temperature": 1.3, "scale": 0.5},
    "capped": {"temperature": 0.9, "scale": 1.5, "softcap": 5.0},
}

UNCLIPPED = ("cispo", "sapo", "kl_cov")
"""Losses without a ratio that delta could bound."""


def made(device: torch.device, dtype: torch.dtype, bias: bool, N: int = 33, D: int = 64, V: int = 157) -> list[Tensor]:
    """hidden (N, D), weight (V, D), bias (V,), targets (N,); the same numbers on every device."""
    generator = torch.Generator().manual_seed(0)
    hidden = 0.5 * torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight, offset = torch.randn(V, D, generator=generator).double(), torch.randn(V, generator=generator).double()
    leaves = [leaf.to(device, dtype).requires_grad_() for leaf in (hidden, weight, *([offset] if bias else []))]
    return [*leaves, torch.randint(0, V, (N,), generator=generator).to(device)]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_chunked_log_probabilities(device: torch.device, dtype: torch.dtype, shape: dict, bias: bool) -> None:
    """Values and the gradients of hidden states, weight and bias, each chunk's logits computed twice.

    A GPU keeps the float32 sums of bfloat16 products, so values are float32's there. Gradients round to bfloat16 what
    goes into their products and what comes out: 2^-9 each at most. A CPU rounds logits up to 16 by 2^-5.
    """
    chunked = sibling("models/test_logprobs").chunked_logps
    dense = sibling("models/test_logprobs").dense_logps
    *leaves, targets = made(device, dtype, bias)
    coefficients = torch.linspace(-1, 1, len(targets), dtype=torch.float64, device=device)
    results = []
    for function, kind in ((chunked, dtype), (dense, torch.float64)):
        own = [leaf.detach().to(kind).requires_grad_() for leaf in leaves]
        extra = {"chunk_tokens": 8} if function is chunked else {}
        logps, entropy = function(*own, *([] if bias else [None]), targets, **shape, **extra)
        loss = (coefficients * logps.double() + 0.5 * coefficients.flip(0) * entropy.double()).sum()
        results.append([logps, entropy, *torch.autograd.grad(loss, own)])
    exact = dtype == torch.float32
    rounded = 2.0**-5 if device.type == "cpu" else 2e-5
    for index, (found, expected) in enumerate(zip(*results, strict=True)):
        tolerance = 2e-5 if exact else rounded if index < 2 else 2.0**-7 + rounded
        assert relative(found, expected) < tolerance, index
        assert found.device.type == device.type
        assert found.dtype == (torch.float32 if index < 2 else dtype)


def test_chunks_change_nothing(device: torch.device, dtype: torch.dtype) -> None:
    chunked = sibling("models/test_logprobs").chunked_logps
    hidden, weight, targets = made(device, dtype, bias=False)
    whole = chunked(hidden, weight, None, targets)
    for rows in (1, 7, 100):
        torch.testing.assert_close(chunked(hidden, weight, None, targets, chunk_tokens=rows), whole)


@pytest.mark.parametrize("loss", list(VARIANTS))
def test_losses(device: torch.device, loss: str) -> None:
    """Against the loops written from the papers: clips on both sides, KL, sampler correction, entropy."""
    paper = sibling("grpo/test_losses")
    configurations = [
        GrpoConfig(loss=loss, minibatches=2, beta=0.0),
        GrpoConfig(loss=loss, minibatches=2, beta=0.04, kl="k3", epsilon_high=0.28, entropy_weight=0.01),
        GrpoConfig(
            loss=loss,
            minibatches=2,
            beta=0.1,
            kl="k2",
            delta=None if loss in UNCLIPPED else 1.5,
            importance_cap=2.0,
        ),
    ]
    for cfg in configurations:
        for seed in range(2):
            data = paper.make(seed)
            data = {k: v.astype(np.float32).astype(np.float64) if v.dtype != bool else v for k, v in data.items()}
            if cfg.importance_cap is None:
                del data["sampler_logps"]
            policy, inputs = paper.tensors(data, torch.float32)
            policy = PolicyOutputs(*(each.detach().to(device).requires_grad_() for each in policy[:2]))
            loss_found = paper.ours(policy, inputs.map(lambda tensor: tensor.to(device)), cfg).loss
            (gradient,) = torch.autograd.grad(loss_found, policy.logps)
            found = loss_found.detach()
            expected, expected_gradient = paper.paper_loss(data, cfg)
            assert found.device.type == device.type
            assert abs(float(found) - expected) <= 1e-5 * max(abs(expected), 0.05)
            assert relative(gradient, torch.from_numpy(expected_gradient)) <= 1e-5


def test_advantages_and_thresholds(device: torch.device) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5, float("nan"), 2.0, 2.0, 2.0, 2.0])
    for scale in ("group", "batch", "none"):
        found = group_advantages(rewards.to(device), 4, scale, batch_std=0.5)
        torch.testing.assert_close(found.cpu(), group_advantages(rewards, 4, scale, batch_std=0.5))
    assert Moments.of(rewards.to(device)) == Moments.of(rewards)
    entropies = torch.arange(10.0)
    assert entropy_threshold(entropies.to(device), 0.3) == entropy_threshold(entropies, 0.3) == 7.0
