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

    m_s = bald_{s+1}, 0 at the last token: bald_s depends on the prefix before s alone, so crediting it to
    token s itself adds a baseline, whose expected gradient is 0. m_s = rmi_s: it depends on token s.
    s counts the tokens in the mask: those of an environment lie between two of them, not among them.
    """
    valid = mask.bool()
    own = statistic.double() * last_tokens(valid, last_n)
    credit = torch.zeros_like(own)
    following, next_own = own.new_zeros(2, len(own))
    for t in range(own.shape[1] - 1, -1, -1):
        reward = next_own if measure == "bald" else own[:, t]
        following = torch.where(valid[:, t], reward + discount * following, following)
        next_own = torch.where(valid[:, t], own[:, t], next_own)
        credit[:, t] = following
    return (credit * valid).float()
