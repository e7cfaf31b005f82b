"""Leave-one-out, MaxRL and pass@k advantages against loops over others, groups and subsets."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vdr_cli.grpo.estimators import leave_one_out, maxrl, pass_at_k

G = 6


def groups_of(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "binary":
        return torch.randint(0, 2, (8 * G,), generator=generator).float()
    return torch.rand(8 * G, generator=generator)


def by_group(rewards: Tensor) -> np.ndarray:
    return rewards.double().numpy().reshape(-1, G)


def exact(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_leave_one_out_is_the_reward_less_the_mean_of_the_others(kind: str) -> None:
    rewards = groups_of(kind)
    expected = [[r - np.mean(np.delete(row, i)) for i, r in enumerate(row)] for row in by_group(rewards)]
    torch.testing.assert_close(leave_one_out(rewards, G).view(-1, G).double(), exact(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_maxrl_is_the_deviation_over_the_mean(kind: str) -> None:
    rewards = groups_of(kind)
    expected = [[(r - row.mean()) / row.mean() if row.mean() else 0.0 for r in row] for row in by_group(rewards)]
    torch.testing.assert_close(maxrl(rewards, G).view(-1, G).double(), exact(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4, 6])
@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_pass_at_k_is_the_mean_over_all_subsets_that_hold_the_completion(kind: str, k: int) -> None:
    rewards = groups_of(kind)
    expected = []
    for row in by_group(rewards):
        subsets = list(itertools.combinations(range(G), k))
        best = {subset: max(row[list(subset)]) for subset in subsets}
        mean, std = np.mean(list(best.values())), np.std(list(best.values()))
        own = [np.mean([best[subset] for subset in subsets if i in subset]) for i in range(G)]
        expected.append([(value - mean) / std if std > 1e-9 else 0.0 for value in own])
    torch.testing.assert_close(pass_at_k(rewards, G, k).view(-1, G).double(), exact(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", range(G + 1))
@pytest.mark.parametrize("k", [2, 3])
def test_binary_rewards_give_the_papers_closed_form(wrong: int, k: int) -> None:
    """Chen et al.: R = 1 - C(N-, k)/C(N, k), s = sqrt(R (1 - R))."""
    R = 1 - math.comb(wrong, k) / math.comb(G, k)
    s = math.sqrt(R * (1 - R))
    right_one = (1 - R) / s if s else 0.0
    wrong_one = (1 - R - math.comb(max(wrong - 1, 0), k - 1) / math.comb(G - 1, k - 1)) / s if s else 0.0
    found = pass_at_k(torch.tensor([0.0] * wrong + [1.0] * (G - wrong)), G, k)
    torch.testing.assert_close(
        found, torch.tensor([wrong_one] * wrong + [right_one] * (G - wrong)), rtol=1e-5, atol=1e-6
    )


def test_the_best_of_k_estimate_has_the_gradient_of_its_expectation() -> None:
    """PKPO: Σ_i E[max_S | i ∈ S] ∇log p(x_i) · k/n is unbiased for ∇E[max of k], here by enumeration of all samples."""
    values, k, n = torch.tensor([0.0, 0.3, 1.0]).double(), 2, 3
    logits = torch.tensor([0.2, -0.4, 0.1], dtype=torch.float64, requires_grad=True)
    p = logits.softmax(0)
    exact = sum(
        math.prod([p[i] for i in draw]) * max(values[i] for i in draw) for draw in itertools.product(range(3), repeat=k)
    )
    (gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    estimate = torch.zeros(3, dtype=torch.float64)
    for draw in itertools.product(range(3), repeat=n):
        weight = math.prod([float(p[i].detach()) for i in draw])
        rewards = values[list(draw)]
        own = [
            np.mean(
                [
                    max(float(rewards[j]) for j in subset)
                    for subset in itertools.combinations(range(n), k)
                    if i in subset
                ]
            )
            for i in range(n)
        ]
        scores = sum(own[i] * p[draw[i]].log() for i in range(n)) * k / n
        estimate += weight * torch.autograd.grad(scores, logits, retain_graph=True)[0]
    torch.testing.assert_close(estimate, gradient)


@pytest.mark.parametrize("estimate", [leave_one_out, maxrl, lambda rewards, size: pass_at_k(rewards, size, 2)])
def test_equal_and_missing_rewards_give_exactly_zero(estimate) -> None:
    for value in (0.0, 1.0, 0.1, 1e8):
        assert torch.equal(estimate(torch.full((G,), value), G), torch.zeros(G))
    found = estimate(torch.tensor([torch.nan, 1.0, 0.0, torch.nan, 0.0, 1.0]), G)
    assert found[0] == found[3] == 0
    kept = estimate(torch.tensor([1.0, 0.0, 0.0, 1.0]), 4)
    torch.testing.assert_close(found[[1, 2, 4, 5]], kept)
    assert torch.equal(estimate(torch.full((G,), torch.nan), G), torch.zeros(G))


def test_where_all_subsets_hold_a_success_nothing_is_pushed() -> None:
    """Fewer failures than k: the best of every subset is 1."""
    assert torch.equal(pass_at_k(torch.tensor([0.0, 1, 1, 1, 1, 1]), G, 2), torch.zeros(G))


def test_the_example_of_the_docs() -> None:
    found = pass_at_k(torch.tensor([0.0, 1.0, 0.0, 0.0]), 4, 2)
    torch.testing.assert_close(found, torch.tensor([-1 / 3, 1.0, -1 / 3, -1 / 3]))


def test_few_rewards_for_k() -> None:
    rewards = torch.tensor([torch.nan, torch.nan, torch.nan, torch.nan, 0.0, 1.0])
    assert torch.equal(pass_at_k(rewards, G, 3), torch.zeros(G))
