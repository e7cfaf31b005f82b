"""Source `entropy`: the policy's entropy at each token, capped by the advantage (Cheng et al., arXiv 2506.14758)."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(
    entropies: Tensor, mask: Tensor, task_advantages: Tensor, alpha: float = 0.4, kappa: float | None = 2.0
) -> Tensor:
    """(B, T) nats, 0 at padding: min(α·H_t, |A|/κ), without gradient; κ None: α·H_t.

    entropies: (B, T) of the distributions that the tokens were drawn from. The paper adds it to the advantage as it is
    (shape `plain`, weight 1), with α 0.4 and κ 2: with κ > 1 the advantage keeps its sign, and where it is 0, so is
    the bonus.
    """
    bonus = alpha * entropies.detach().float()
    if kappa is not None:
        bonus = torch.minimum(bonus, task_advantages.abs().unsqueeze(1) / kappa)
    return bonus * mask
