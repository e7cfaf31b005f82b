"""The tokens of Clip-Cov and KL-Cov, and the losses on them, against loops written from the paper in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vdr_cli.grpo.covariance import covariances, drawn, highest
from vdr_cli.grpo.losses import LossInputs, LossSettings, PolicyOutputs, Totals, policy_loss, token_weights

N = 400


def tokens(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Advantages, log-probabilities and random numbers of a step's tokens."""
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1.5, N), -rng.exponential(2.0, N), rng.random(N)


def paper_covariances(advantages: np.ndarray, logps: np.ndarray) -> list[float]:
    """(log π(y_i) − mean_j log π(y_j)) · (A(y_i) − mean_j A(y_j))"""
    mean_logp, mean_advantage = sum(logps) / N, sum(advantages) / N
    return [(logp - mean_logp) * (a - mean_advantage) for a, logp in zip(advantages, logps, strict=True)]


def ours(advantages: np.ndarray, logps: np.ndarray) -> torch.Tensor:
    return covariances(torch.tensor(advantages), torch.tensor(logps), advantages.mean(), logps.mean())


@pytest.mark.parametrize("seed", range(3))
def test_the_covariance_is_the_papers(seed: int) -> None:
    advantages, logps, _ = tokens(seed)
    assert ours(advantages, logps).tolist() == pytest.approx(paper_covariances(advantages, logps), rel=1e-12)
    assert sum(paper_covariances(advantages, logps)) / N == pytest.approx(np.cov(advantages, logps, ddof=0)[0, 1])


@pytest.mark.parametrize(("share", "count"), [(0.02, 8), (0.0002, 1), (0.019, 7), (1.0, N)])
def test_kl_cov_takes_the_highest(share: float, count: int) -> None:
    advantages, logps, _ = tokens(1)
    expected = sorted(range(N), key=lambda i: -paper_covariances(advantages, logps)[i])[:count]
    assert highest(ours(advantages, logps), share).nonzero().flatten().tolist() == sorted(expected)
    assert not len(highest(torch.zeros(0), share))


def test_of_equal_covariances_the_first_is_taken() -> None:
    assert highest(torch.tensor([0.0, 2.0, 2.0, 2.0]), 0.5).tolist() == [False, True, True, False]


@pytest.mark.parametrize(("share", "most"), [(0.02, 8), (0.0002, 1), (1.0, N)])
def test_clip_cov_draws_among_tokens_within_the_bounds(share: float, most: int) -> None:
    advantages, logps, numbers = tokens(2)
    covariance = paper_covariances(advantages, logps)
    candidates = [i for i in range(N) if 1.0 < covariance[i] < 5.0]
    assert 8 < len(candidates) < N
    expected = sorted(candidates, key=lambda i: numbers[i])[:most]
    chosen = drawn(ours(advantages, logps), torch.tensor(numbers), share, 1.0, 5.0)
    assert chosen.nonzero().flatten().tolist() == sorted(expected)
    assert not drawn(torch.zeros(N), torch.tensor(numbers), share, 1.0, 5.0).any(), "no candidate"


def test_every_candidate_is_as_likely() -> None:
    covariance = torch.tensor([0.0, 2.0, 3.0, 4.0, 9.0] * 2)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(3000):
        counts += drawn(covariance, torch.rand(10, generator=generator, dtype=torch.float64), 0.3, 1.0, 5.0)
    assert counts[[0, 4, 5, 9]].sum() == 0
    assert ((counts[[1, 2, 3, 6, 7, 8]] / 3000 - 0.5).abs() < 0.05).all()  # 3 of 6, 5 standard errors


@pytest.mark.parametrize("loss", ["clip_cov", "kl_cov"])
def test_value_and_gradient_of_a_whole_step(loss: str) -> None:
    """Choice and loss together: one step of N tokens, from the paper's definition alone."""
    advantages, old, numbers = tokens(3)
    log_ratio = np.random.default_rng(9).normal(0, 0.4, N)
    covariance = paper_covariances(advantages, old)
    if loss == "kl_cov":
        special = set(sorted(range(N), key=lambda i: -covariance[i])[: int(0.05 * N)])
    else:
        candidates = [i for i in range(N) if 1.0 < covariance[i] < 5.0]
        special = set(sorted(candidates, key=lambda i: numbers[i])[: int(0.05 * N)])
    value, gradient = 0.0, np.zeros(N)
    for i in range(N):
        ratio, A = np.exp(log_ratio[i]), advantages[i]
        if loss == "kl_cov":
            held = i in special
            value += (-ratio * A + held * abs(log_ratio[i])) / N
            gradient[i] = (-ratio * A + held * np.sign(log_ratio[i])) / N
        elif i not in special:
            clipped = min(max(ratio, 0.8), 1.28)
            value -= min(ratio * A, clipped * A) / N
            gradient[i] = -ratio * A / N if ratio * A <= clipped * A else 0.0
    measured = ours(advantages, old)
    chosen = highest(measured, 0.05) if loss == "kl_cov" else drawn(measured, torch.tensor(numbers), 0.05, 1.0, 5.0)
    logps = torch.tensor(old + log_ratio)[None].requires_grad_()
    mask = torch.ones(1, N, dtype=torch.bool)
    inputs = LossInputs(
        torch.tensor(advantages)[None],
        mask,
        old_logps=torch.tensor(old)[None],
        covariant=chosen[None],
        weights=token_weights(loss, mask, Totals(1, N), N, torch.float64),
    )
    output = policy_loss(PolicyOutputs(logps), inputs, LossSettings(loss=loss))
    assert output.loss.item() == pytest.approx(value, rel=1e-12)
    assert torch.autograd.grad(output.loss, logps)[0][0].numpy() == pytest.approx(gradient, rel=1e-10, abs=1e-15)
    top, bottom = output.metrics["covariance/share"]
    assert (float(top), float(bottom)) == (len(special), N)
