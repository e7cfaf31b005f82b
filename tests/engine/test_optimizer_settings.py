"""Learning rate and optimizer: each setting where it belongs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vdr_cli.config import TrainConfig
from vdr_cli.engine.optimizer import build_optimizer, learning_rate_at


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
    ],
)
def test_warmup_reaches_the_rate_and_the_schedule_leaves_it(schedule: str, expected: list[float]) -> None:
    settings = TrainConfig(steps=8, learning_rate=2.0, warmup_steps=4, lr_schedule=schedule)
    rates = [learning_rate_at(step, settings) for step in range(8)]
    assert rates == pytest.approx([2.0 * share for share in expected])


def test_without_warmup_the_first_step_has_the_whole_rate() -> None:
    settings = TrainConfig(steps=4, learning_rate=2.0, lr_schedule="linear")
    assert [learning_rate_at(step, settings) for step in range(4)] == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_adamw_gets_betas_epsilon_and_decay_of_matrices_alone() -> None:
    settings = TrainConfig(adam_betas=(0.7, 0.95), adam_epsilon=1e-5, weight_decay=0.3)
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, settings, torch.device("cpu"))
    assert isinstance(optimizer, torch.optim.AdamW)
    found = [(group["weight_decay"], [p.dim() for p in group["params"]]) for group in optimizer.param_groups]
    assert found == [(0.3, [2]), (0.0, [1])]
    assert all(group["betas"] == (0.7, 0.95) and group["eps"] == 1e-5 for group in optimizer.param_groups)


def test_clipping_shortens_the_gradient_that_moves_the_weights(build, completions, one_step) -> None:
    """With an epsilon far above the gradient AdamW moves in proportion to it."""

    def moved(max_grad_norm: float) -> tuple[float, float]:
        engine = build(2, max_grad_norm, train={"adam_epsilon": 1e6})
        before = [p.detach().clone() for p in engine.causal_lm.parameters()]
        _, result = one_step(engine, completions, learning_rate=1e3)
        pairs = zip(engine.causal_lm.parameters(), before, strict=True)
        return math.sqrt(sum(float((p.detach() - old).square().sum()) for p, old in pairs)), result.grad_norm

    (free, norm), (clipped, _) = moved(0.0), moved(0.1)
    assert norm > 1.0 and clipped / free == pytest.approx(0.1 / norm, rel=1e-2)
