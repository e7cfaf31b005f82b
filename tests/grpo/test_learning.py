"""Learning with a known answer: a two-token bandit whose best completion every loss must find."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vdr_cli.grpo.advantages import group_advantages
from vdr_cli.grpo.losses import VARIANTS, LossInputs, LossSettings, PolicyOutputs, Totals, policy_loss, token_weights

CONTEXTS, V, T, G, EOS = 2, 5, 2, 8, 4
BEST = torch.tensor([[1, 3], [2, 0]])
SETTINGS = {name: LossSettings(loss=name) for name in VARIANTS}


def draw(theta: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """G completions of each context: context (B,), tokens (B, 2), mask (B, 2). EOS first ends the completion."""
    context = torch.arange(CONTEXTS).repeat_interleave(G)
    probabilities = theta.detach().softmax(-1)[context].view(-1, V)
    tokens = torch.multinomial(probabilities, 1, generator=generator).view(-1, T)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 1] = tokens[:, 0] != EOS
    return context, tokens, mask


def learned(cfg: LossSettings, steps: int = 30, micro_batches: int = 2) -> float:
    """Probability of the best completion, mean over contexts, after training from the uniform policy."""
    theta = torch.zeros(CONTEXTS, T, V, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        context, tokens, mask = draw(theta, generator)
        rewards = ((tokens == BEST[context]) & mask).float().sum(1)
        advantages = group_advantages(rewards, G)
        totals = Totals(completions=len(context), tokens=float(mask.sum()))
        old = token_logps(theta, context, tokens).detach()
        for _ in range(2):
            optimizer.zero_grad()
            for part in torch.arange(len(context)).chunk(micro_batches):
                logps = token_logps(theta, context[part], tokens[part])
                inputs = LossInputs(
                    advantages[part],
                    mask[part],
                    old_logps=old[part],
                    covariant=torch.rand(logps.shape, generator=generator) < 0.1,
                    weights=token_weights(cfg.loss, mask[part], totals, T),
                )
                policy_loss(PolicyOutputs(logps), inputs, cfg).loss.backward()
            optimizer.step()
    probabilities = theta.detach().softmax(-1)
    return float(torch.stack([probabilities[c, range(T), BEST[c]].prod() for c in range(CONTEXTS)]).mean())


def token_logps(theta: Tensor, context: Tensor, tokens: Tensor) -> Tensor:
    return theta.log_softmax(-1)[context[:, None], torch.arange(T), tokens]


def check_learns(loss: str) -> None:
    assert learned(SETTINGS[loss]) > 0.9


@pytest.mark.parametrize("loss", list(VARIANTS))
def test_every_loss_finds_the_best_completion(loss: str) -> None:
    check_learns(loss)
