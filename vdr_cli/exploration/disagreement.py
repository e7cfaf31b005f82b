"""Source `disagreement`: what dropout members disagree about (Dao 2025; Houlsby et al. 2011, arXiv 1112.5745).

The measures themselves are made in vdr_cli/disagreement; here they become a number per completion or token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vdr_cli.samples import last_tokens


def token_credit(
    statistic: Tensor,
    mask: Tensor,
    measure: Literal["bald", "rmi"] = "bald",
    discount: float = 1.0,
    last_n: int | None = None,
) -> Tensor:
    """The credit of each token for what follows it: c_t = Σ_{s>=t} γ^{s-t} m_s, (B, T).

    m_s = bald_{s+1}, 0 at the last valid token: bald_s depends on the prefix before s alone, so crediting it to
    token s itself adds a baseline, whose expected gradient is 0. m_s = rmi_s: it depends on token s.
    """
    kept = last_tokens(mask, last_n)
    reward = statistic.double() * kept
    if measure == "bald":
        reward = torch.nn.functional.pad(reward[:, 1:], (0, 1))
    credit = torch.zeros_like(reward)
    following = reward.new_zeros(len(reward))
    for t in range(reward.shape[1] - 1, -1, -1):
        following = reward[:, t] + discount * following
        credit[:, t] = following
    return (credit * mask).float()
