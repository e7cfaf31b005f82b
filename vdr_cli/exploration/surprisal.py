"""Source `surprisal`: how unlikely a completion was to the policy that sampled it (CDE, arXiv 2509.09675)."""

from __future__ import annotations

from torch import Tensor

from vdr_cli.exploration.bonus import reduce


def surprisal(
    log_probs: Tensor, mask: Tensor, task_rewards: Tensor, alpha: float = 1.0, kappa: float | None = None
) -> Tensor:
    """(B,) nats: α·s with s = -(1/T) Σ_t log π(y_t), at most |r|/κ where κ is given; 0 where r is NaN then.

    log_probs: (B, T) of the sampled tokens. CDE adds ω·min(|r|/κ, α·s) to rewards of -1 and 1 before they are
    normalised, with κ 3, α 1 and ω falling to 0: shape `reward`, schedule `staircase`.
    """
    bonus = alpha * reduce(-log_probs, mask)
    return bonus if kappa is None else bonus.minimum(task_rewards.abs().nan_to_num(nan=0.0) / kappa)
