"""Learning rate, clipping and AdamW: by hand, and against torch's optimizer."""

from __future__ import annotations

import math

import pytest
import torch

from vdr_cli.audit import numbers, optimizer
from vdr_cli.audit.lines import Judge


def test_learning_rate():
    rate = [optimizer.learning_rate(step, 1.0, 2, "linear", 6) for step in range(6)]
    assert rate == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    assert optimizer.learning_rate(4, 1.0, 2, "cosine", 6) == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert optimizer.learning_rate(5, 1.0, 0, "constant", 6) == 1.0


def test_clip_factor():
    assert optimizer.clip_factor(2.0, 1.0) == pytest.approx(0.5, rel=1e-6)
    assert optimizer.clip_factor(0.5, 1.0) == 1.0
    assert optimizer.clip_factor(5.0, 0.0) == 1.0


def test_adamw_is_torchs_with_decay_on_matrices_alone():
    torch.manual_seed(0)
    start = {"matrix": torch.randn(3, 4).double(), "vector": torch.randn(4).double()}
    ours = {name: weight.clone() for name, weight in start.items()}
    theirs = {name: torch.nn.Parameter(weight.clone()) for name, weight in start.items()}
    groups = [{"params": [theirs["matrix"]], "weight_decay": 0.3}, {"params": [theirs["vector"]], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-3)
    adam = optimizer.AdamW((0.8, 0.95), 1e-3, 0.3)
    for step in range(4):
        gradients = {name: torch.randn_like(weight) for name, weight in start.items()}
        for name, parameter in theirs.items():
            parameter.grad = gradients[name]
        for group in reference.param_groups:
            group["lr"] = 0.1 / (step + 1)
        reference.step()
        adam.update(ours, gradients, 0.1 / (step + 1))
    for name, weight in ours.items():
        assert torch.allclose(weight, theirs[name].detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("updates", [1, 3])
def test_the_update_of_small_rates_is_judged_by_what_float32_weights_can_hold(updates: int):
    """torch's AdamW in float32 at the default rate is within the bound, a rate or a moment that is off is not."""
    torch.manual_seed(0)
    start = {"matrix": torch.randn(64, 64) * 0.02, "norm": torch.ones(256)}
    gradients = [{name: torch.randn_like(weight) for name, weight in start.items()} for _ in range(updates)]
    stored = {name: torch.nn.Parameter(weight.clone()) for name, weight in start.items()}
    groups = [{"params": [stored["matrix"]], "weight_decay": 0.1}, {"params": [stored["norm"]], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1e-6)

    def ours(rate: float) -> dict[str, torch.Tensor]:
        adam, weights = optimizer.AdamW((0.9, 0.999), 1e-8, 0.1), {n: w.double() for n, w in start.items()}
        for each in gradients:
            adam.update(weights, {name: gradient.double() for name, gradient in each.items()}, rate)
        return weights

    for each in gradients:
        for name, parameter in stored.items():
            parameter.grad = each[name]
        theirs.step()

    def judged(rate: float, rounding: float) -> bool | None:
        moved = numbers._minus(stored, start), numbers._minus(ours(rate), start)  # type: ignore[arg-type]
        return numbers._relative(Judge(1, "float32"), "update of the weights", *moved, rounding=rounding).within

    rounding = updates * optimizer.spacing_of(stored.values())
    assert judged(1e-6, rounding) and not judged(1e-6, 0.0)
    assert not judged(1.2e-6, rounding) and not judged(0.8e-6, rounding)
