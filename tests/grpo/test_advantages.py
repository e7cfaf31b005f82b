"""Rewards to advantages against float64 loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vdr_cli.grpo.advantages import (
    Moments,
    combine_rewards,
    group_advantages,
    group_moments,
    normalised_sum,
    overlong_penalty,
    standardise,
    zero_variance,
)

NAN = float("nan")


def loop_group_scores(rewards: np.ndarray, group_size: int, scale: str, batch_std: float) -> np.ndarray:
    out = np.zeros(len(rewards))
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        valid = group[~np.isnan(group)]
        for i, reward in enumerate(group):
            if np.isnan(reward):
                continue
            std = valid.std(ddof=1) if len(valid) > 1 else 0.0
            divisor = {"group": std + 1e-4, "batch": batch_std + 1e-4, "none": 1.0}[scale]
            out[start + i] = (reward - valid.mean()) / divisor
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equals_loop(scale: str, dtype: torch.dtype, tolerance: float) -> None:
    rewards = torch.randn(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    rewards[[3, 8, 9, 10]] = NAN
    batch_std = Moments.of(rewards).std
    assert batch_std == pytest.approx(np.nanstd(rewards.double().numpy(), ddof=1))
    ours = group_advantages(rewards, 4, scale, batch_std).double().numpy()
    theirs = loop_group_scores(rewards.double().numpy(), 4, scale, batch_std)
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.0, 1e6])
def test_equal_rewards_give_exactly_zero(scale: str, value: float) -> None:
    rewards = torch.full((14,), value)
    rewards[2] = NAN
    assert (group_advantages(rewards, 7, scale, batch_std=0.0) == 0).all()


def test_lone_and_missing_rewards_give_zero() -> None:
    rewards = torch.tensor([5.0, NAN, NAN, NAN, NAN, NAN])
    assert group_advantages(rewards, 3).tolist() == [0.0] * 6
    mean, std = group_moments(rewards, 3)
    assert mean[0] == 5.0
    assert std[0] == 0.0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_an_infinite_reward_is_not_passed_over(scale: str) -> None:
    """As the KL in the reward can make one: were its group given 0, the step would not be refused."""
    rewards = torch.tensor([1.0, -torch.inf, 0.0, 1.0, NAN, 0.0])
    advantages = group_advantages(rewards, 3, scale, batch_std=1.0)
    assert not advantages[:3].isfinite().any()
    assert advantages[3:].isfinite().all() and advantages[4] == 0.0


def test_batch_scale_needs_the_steps_std() -> None:
    with pytest.raises(ValueError, match="batch_std"):
        group_advantages(torch.zeros(4), 2, "batch")


def test_combine_skips_what_is_missing() -> None:
    rewards = torch.tensor([[1.0, 2.0], [NAN, 2.0], [NAN, NAN]])
    combined = combine_rewards(rewards, torch.tensor([1.0, 0.5]))
    assert combined[:2].tolist() == [2.0, 1.0]
    assert combined[2].isnan()


def test_normalise_then_sum_equals_loop() -> None:
    rewards = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards *= torch.tensor([1.0, 100.0, 0.01])
    rewards[2, 1] = NAN
    rewards[5] = NAN
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    values = np.zeros(12)
    for f in range(3):
        values += weights[f].item() * loop_group_scores(rewards[:, f].numpy(), 4, "group", 0.0)
    values[5] = NAN
    expected = (values - np.nanmean(values)) / (np.nanstd(values, ddof=1) + 1e-4)
    combined = normalised_sum(rewards, weights, 4)
    ours = standardise(combined, Moments.of(combined))
    np.testing.assert_allclose(ours.numpy(), np.nan_to_num(expected), rtol=1e-10)


def test_normalise_then_sum_ignores_a_functions_scale() -> None:
    rewards = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.ones(2, dtype=torch.float64)
    scaled = rewards * torch.tensor([1.0, 1000.0])
    torch.testing.assert_close(
        normalised_sum(rewards, weights, 4), normalised_sum(scaled, weights, 4), rtol=1e-3, atol=1e-3
    )


def test_moments_add_up_over_ranks() -> None:
    values = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = Moments.of(values[:7]), Moments.of(values[7:])
    total = Moments(first.count + second.count, first.total + second.total, first.squares + second.squares)
    assert total.mean == pytest.approx(values.mean().item())
    assert total.std == pytest.approx(values.std().item())
    assert Moments.of(torch.tensor([NAN])).std == 0.0


def test_zero_variance() -> None:
    rewards = torch.tensor([1.0, 1.0, 1.0, NAN, 0.0, 1.0, NAN, NAN])
    assert zero_variance(rewards, 2).tolist() == [True, True, False, True]


def test_soft_overlong_penalty() -> None:
    """DAPO eq. 13 with L_max 10 and L_cache 4: 0 up to 6, −1 at 10."""
    penalty = overlong_penalty(torch.tensor([1, 6, 7, 8, 10, 11]), 10, 4)
    assert penalty.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    assert overlong_penalty(torch.tensor([10]), 10, 0).tolist() == [0.0]
