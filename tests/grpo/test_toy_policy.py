"""A policy whose completions can be enumerated: 3 tokens, at most 3 long, 15 completions.

Exact expectations over all groups, so that "unbiased" is a number, and the sampled mean within its own interval.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from vdr_cli.exploration.bonus import shaped_advantages
from vdr_cli.grpo.advantages import group_advantages
from vdr_cli.grpo.losses import VARIANTS, LossInputs, LossSettings, PolicyOutputs, Totals, policy_loss, token_weights

V, T, G, EOS = 3, 3, 2, 2
WEIGHT, RMS = 0.7, 0.5


@cache
def space() -> tuple[Tensor, Tensor, Tensor]:
    """Every completion as (state, token, mask), each (15, 3); a state is a prefix without EOS, 7 of them."""
    prefixes = [p for length in range(T) for p in product(range(V - 1), repeat=length)]
    index = {prefix: i for i, prefix in enumerate(prefixes)}
    ended = [(*prefix, EOS) for prefix in prefixes]
    completions = ended + list(product(range(V - 1), repeat=T))
    states, tokens = torch.zeros(2, len(completions), T, dtype=torch.int64)
    mask = torch.zeros(len(completions), T, dtype=torch.bool)
    for row, completion in enumerate(completions):
        for t, token in enumerate(completion):
            states[row, t], tokens[row, t], mask[row, t] = index[completion[:t]], token, True
    return states, tokens, mask


def policy() -> Tensor:
    return torch.randn(7, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def token_logps(theta: Tensor) -> Tensor:
    """(15, 3), 0 at padding."""
    states, tokens, mask = space()
    return theta.log_softmax(-1)[states, tokens] * mask


def table(seed: int) -> Tensor:
    """A number for every completion: a reward, or a measure."""
    return torch.randn(15, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def advantages(group: Tensor, scale: str, weight: float, clip: float) -> Tensor:
    """Task advantages and the additive bonus of one group (G,) of completions."""
    rewards, measure = table(1)[group], table(2)[group]
    task = group_advantages(rewards, G, scale)
    gate = torch.ones(G, dtype=torch.bool)
    return shaped_advantages("additive", task, rewards, measure, gate, G, weight, clip, RMS)[0].double()


def group_gradients(loss: str, scale: str, weight: float = 0.0, clip: float = 3.0) -> tuple[Tensor, Tensor]:
    """The gradient of every possible group's step, (225, 21), and the groups' probabilities (225,)."""
    theta = policy()
    mask = space()[2]
    gradients, probabilities = [], []
    for pair in product(range(15), repeat=G):
        group = torch.tensor(pair)
        logps = token_logps(theta)[group]
        totals = Totals(completions=G, tokens=float(mask[group].sum()))
        weights = token_weights(loss, mask[group], totals, T, torch.float64)
        nothing = torch.zeros_like(mask[group])
        inputs = LossInputs(advantages(group, scale, weight, clip), mask[group], covariant=nothing, weights=weights)
        output = policy_loss(PolicyOutputs(logps), inputs, LossSettings(loss=loss))
        gradients.append(torch.autograd.grad(output.loss, theta)[0].flatten())
        probabilities.append(logps.detach().sum().exp())
    return torch.stack(gradients), torch.stack(probabilities)


def exact_gradient(values: Tensor) -> Tensor:
    """∇ Σ_y π(y) value(y), (21,)."""
    theta = policy()
    return torch.autograd.grad((token_logps(theta).sum(1).exp() * values).sum(), theta)[0].flatten()


def test_probabilities_sum_to_one() -> None:
    assert token_logps(policy()).sum(1).exp().sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("weight", [0.0, WEIGHT])
def test_mean_over_all_groups_is_the_exact_gradient(weight: float) -> None:
    """dr_grpo without scaling: E[∇loss] = −(1 − 1/G) ∇E[r + λ b/rms] / T_max (a group's mean holds its own member)."""
    gradients, probabilities = group_gradients("dr_grpo", "none", weight, clip=1e6)
    exact = -(1 - 1 / G) / T * exact_gradient(table(1) + weight * table(2) / RMS)
    tolerance = 1e-12 if weight == 0 else 1e-6  # the bonus is float32
    assert (probabilities @ gradients - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize(("loss", "weight"), [*((loss, WEIGHT) for loss in VARIANTS), ("dapo", 0.0)])
def test_sampled_mean_is_within_its_interval(loss: str, weight: float) -> None:
    """20,000 groups drawn token by token; 5 standard errors for each of 21 coordinates."""
    gradients, probabilities = group_gradients(loss, "group", weight, clip=1.0)
    exact = probabilities @ gradients
    drawn = sample(20_000)
    sampled = gradients[drawn[:, 0] * 15 + drawn[:, 1]]
    error = sampled.std(0) / len(sampled) ** 0.5
    assert ((sampled.mean(0) - exact).abs() <= 5 * error + 1e-15).all()


@pytest.mark.parametrize("weight", [0.0, WEIGHT])
def test_sampled_mean_is_the_gradient_of_what_is_maximised(weight: float) -> None:
    """The estimator against ∇E[r + λ b/rms] itself, within 5 of its own standard errors; no enumeration of groups."""
    gradients, _ = group_gradients("dr_grpo", "none", weight, clip=1e6)
    drawn = sample(20_000)
    sampled = gradients[drawn[:, 0] * 15 + drawn[:, 1]]
    exact = -(1 - 1 / G) / T * exact_gradient(table(1) + weight * table(2) / RMS)
    error = sampled.std(0) / len(sampled) ** 0.5
    assert (exact.abs() > 20 * error).any()  # the interval is small enough to tell a wrong estimator
    assert ((sampled.mean(0) - exact).abs() <= 5 * error + 1e-15).all()


def sample(groups: int) -> Tensor:
    """(groups, G) indices of completions, drawn token by token from the policy."""
    probabilities = policy().detach().softmax(-1)
    states, tokens, mask = space()
    generator = torch.Generator().manual_seed(3)
    alive = torch.ones(groups * G, 15, dtype=torch.bool)  # completions that agree with the tokens so far
    for t in range(T):
        open_rows = (alive & mask[:, t]).any(1)
        state = torch.where(alive & mask[:, t], states[:, t], 0).amax(1)
        drawn = torch.multinomial(probabilities[state], 1, generator=generator)
        agrees = (tokens[:, t] == drawn) & mask[:, t]
        alive = torch.where(open_rows[:, None], alive & agrees, alive)
    assert (alive.sum(1) == 1).all()
    return alive.long().argmax(1).view(groups, G)


def test_equal_rewards_move_only_with_the_bonus() -> None:
    group = torch.tensor([0, 5])
    assert (group_advantages(torch.ones(G), G) == 0).all()
    assert advantages(group, "group", WEIGHT, 3.0).abs().sum() > 0
