"""Parts of a loss: masks, sampler weights, the entropy threshold, estimates of the KL divergence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.grpo.paper import B, T, make, paper_kl
from vdr_cli.grpo.losses import entropy_threshold, kl_estimate, kl_penalised_rewards, loss_mask, sampler_weights


def test_masking_truncated_completions() -> None:
    mask = torch.ones(3, 2, dtype=torch.bool)
    truncated = torch.tensor([False, True, False])
    assert loss_mask(mask, truncated, False).all()
    assert loss_mask(mask, truncated, True).sum(1).tolist() == [2, 0, 2]


def test_sampler_weights_are_capped_and_ignore_unknown_tokens() -> None:
    old = torch.zeros(1, 4)
    sampler = torch.tensor([[-1.0, 1.0, torch.nan, -5.0]])
    mask = torch.tensor([[True, True, True, False]])
    expected = torch.tensor([[2.0, float(np.exp(-1)), 1.0, 1.0]])
    torch.testing.assert_close(sampler_weights(old, sampler, mask, cap=2.0), expected)


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_entropy_threshold_keeps_the_share(share: float) -> None:
    entropies = torch.randperm(50).float()
    assert (entropies >= entropy_threshold(entropies, share)).sum() == round(share * 50)
    assert entropy_threshold(torch.empty(0), share) == -torch.inf


def test_kl_estimates_have_the_right_mean() -> None:
    """Σ_y π(y) k(y) is KL(π ‖ π_ref) for k1 and k3; the gradients are those that the docstring says."""
    theta = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ref = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(0)
    log_p = theta.log_softmax(0)
    p = log_p.exp()
    forward = (p * (log_p - ref)).sum()
    reverse = (ref.exp() * (ref - log_p)).sum()
    for kind, target in (("k1", None), ("k2", forward), ("k3", reverse)):
        estimate = kl_estimate(log_p - ref, kind)
        if kind != "k2":
            assert (p * estimate).sum().item() == pytest.approx(forward.item())
        (gradient,) = torch.autograd.grad((p.detach() * estimate).sum(), theta, retain_graph=True)
        wanted = torch.zeros(5, dtype=torch.float64)
        if target is not None:
            (wanted,) = torch.autograd.grad(target, theta, retain_graph=True)
        torch.testing.assert_close(gradient, wanted)


def test_large_kl_is_not_clamped() -> None:
    assert kl_estimate(torch.tensor(-50.0), "k3") > 1e21


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_in_the_reward(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    data = make()
    rewards = np.random.default_rng(7).normal(size=B)
    expected = rewards.copy()
    for b in range(B):
        for t in range(T):
            if data["mask"][b, t]:
                expected[b] -= 0.5 * paper_kl(data["logps"][b, t] - data["ref_logps"][b, t], kind)[0]
    data["ref_logps"][~data["mask"]] = np.nan
    logps, ref, given = (torch.tensor(each).to(dtype) for each in (data["logps"], data["ref_logps"], rewards))
    ours = kl_penalised_rewards(given, logps, ref, torch.tensor(data["mask"]), 0.5, kind).double().numpy()
    assert np.linalg.norm(ours - expected) <= tolerance * np.linalg.norm(expected)
