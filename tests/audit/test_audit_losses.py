"""Losses of one completion of two tokens, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from vdr_cli.audit import losses
from vdr_cli.config import GrpoConfig

TOTALS = losses.Denominators(completions=4, tokens=10)
OLD = torch.tensor([-1.0, -2.0], dtype=torch.float64)
STEPS = (0.5, -0.5)
"""log ρ of the two tokens."""


def row(advantages=(1.0, 1.0), **more):
    logps = (OLD + torch.tensor(STEPS, dtype=torch.float64)).requires_grad_()
    values = {
        "logps": logps,
        "entropy": torch.tensor([0.3, 0.5], dtype=torch.float64),
        "old_logps": OLD,
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "trained": torch.tensor([True, True]),
        "sampler_logps": OLD,
        **more,
    }
    return losses.Row(**values)


def loss_of(given: losses.Row, longest: int = 5, **settings) -> float:
    cfg = GrpoConfig(**{"epsilon_low": 0.2, "epsilon_high": 0.28, **settings})
    return float(losses.row_loss(given, losses.policy_terms(given, cfg), cfg, TOTALS, longest).detach())


RATIOS = [math.exp(step) for step in STEPS]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("dapo", -(1.28 + RATIOS[1]) / 10),
        ("grpo", -(1.28 + RATIOS[1]) / (2 * 4)),
        ("dr_grpo", -(1.28 + RATIOS[1]) / (4 * 5)),
        ("gspo", -2.0 / (2 * 4)),  # the mean of log ρ is 0
        ("cispo", -(1.28 * -0.5 + RATIOS[1] * -2.5) / 10),
        ("sapo", -sum(4 / (1 + math.exp(1 - ratio)) for ratio in RATIOS) / (2 * 4)),
    ],
)
def test_losses(loss, expected):
    assert loss_of(row(), loss=loss) == pytest.approx(expected)


def test_a_negative_advantage_is_clipped_below_and_bounded_by_delta():
    given = row(advantages=(-1.0, -1.0))
    assert loss_of(given) == pytest.approx((RATIOS[0] + 0.8) / 10)
    assert loss_of(given, delta=1.4) == pytest.approx((1.4 + 0.8) / 10)
    terms = losses.policy_terms(given, GrpoConfig())
    assert terms.low.tolist() == [False, True] and terms.high.tolist() == [False, False]
    assert losses.policy_terms(row(), GrpoConfig()).high.tolist() == [True, False]


def test_tokens_that_cost_entropy():
    held = {"covariant": torch.tensor([True, False])}
    assert loss_of(row(**held), loss="clip_cov") == pytest.approx(-RATIOS[1] / 10)
    found = loss_of(row(**held), loss="kl_cov", kl_cov_weight=2.0, minibatches=2)
    assert found == pytest.approx((-RATIOS[0] - RATIOS[1] + 2.0 * 0.5) / 10)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss": "kl_cov", "kl_cov_share": 0.25}, [True, False, False, False]),
        ({"loss": "kl_cov", "kl_cov_share": 0.5}, [True, False, False, True]),
        ({"loss": "clip_cov", "clip_cov_share": 0.25}, [False, False, False, True]),
        ({"loss": "clip_cov", "clip_cov_share": 0.5, "clip_cov_low": -1}, [False, True, False, True]),
    ],
)
def test_the_choice_of_those_tokens(settings, expected):
    """Four tokens with covariances 8.5, 0, 0 and 1.5."""
    advantages, logps = (4.0, 0.0, 0.0, -4.0), (-1.0, -3.0, -5.0, -3.5)  # means 0 and -3.125
    cfg = GrpoConfig(minibatches=2, **settings)
    found = losses.covariant_tokens(advantages, logps, (0.1, 0.3, 0.4, 0.2), cfg)
    assert found == expected


def test_options_of_the_loss():
    plain = loss_of(row())
    assert loss_of(row(), entropy_weight=2.0) == pytest.approx(plain - 2.0 * 0.8 / 10)
    assert loss_of(row(selected=torch.tensor([False, True]))) == pytest.approx(-RATIOS[1] / 10)
    assert loss_of(row(trained=torch.tensor([True, False]))) == pytest.approx(-1.28 / 10)
    off = OLD - torch.tensor([1.0, math.nan], dtype=torch.float64)
    assert loss_of(row(sampler_logps=off), importance_cap=1.5) == pytest.approx(-(1.28 * 1.5 + RATIOS[1]) / 10)


@pytest.mark.parametrize(("kind", "value"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 0.5)])
def test_kl(kind, value):
    reference = row().logps.detach() - torch.tensor([0.5, 0.0], dtype=torch.float64)
    given = row(ref_logps=reference)
    assert loss_of(given, beta=2.0, kl=kind) == pytest.approx(loss_of(row()) + 2.0 * value / 10)
    assert loss_of(given, beta=2.0, kl=kind, kl_in="reward") == pytest.approx(loss_of(row()))


def test_selection_threshold():
    assert losses.selection_threshold([0.1, 0.5, 0.3, 0.2, 0.4], 0.4) == 0.4
    assert losses.selection_threshold([0.1, 0.5], 0.01) == 0.5
