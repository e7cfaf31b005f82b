"""Per-token numbers to the columns of one completion. Sums are float64 over valid tokens: padding cannot move them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vdr_cli.disagreement.information import Statistics, at_last, ig_seq, rmi_seq
from vdr_cli.samples import Completions

MEASURES = frozenset(
    ("total", "aleatoric", "bald", "rmi", "epkl", "logp_var", "vote_disagree", "bald_jk", "bald_se", "member_logps")
)
"""The measures that the ensemble computes."""

Columns = dict[str, NDArray[Any]]


def base_columns(logps: Tensor, entropy: Tensor, mask: Tensor) -> Columns:
    """Columns of the model itself, dropout off. logps, entropy, mask: (B, T), the mask with a token in every row.

    The mask says which tokens are measured: the assistant's.
    """
    count = mask.sum(1)
    nll_sum = -(logps.double() * mask).sum(1)
    nll_mean = nll_sum / count
    return {
        "n_tokens": _array(count),
        "nll_sum": _array(nll_sum),
        "nll_mean": _array(nll_mean),
        "ppl": _array(nll_mean.exp()),
        "entropy_mean": _array(_mean(entropy, mask)),
        "entropy_max": _array(_max(entropy, mask)),
    }


def ensemble_columns(statistics: Statistics, mask: Tensor) -> Columns:
    """Columns of the ensemble, from its statistics at all positions, (B, T) each."""
    bald = statistics.get("bald")
    member_logps = statistics.get("member_logps")
    means = {
        "total_mean": "total",
        "aleatoric_mean": "aleatoric",
        "bald_mean": "bald",
        "bald_mean_jk": "bald_jk",
        "bald_se": "bald_se",
        "epkl_mean": "epkl",
        "rmi_mean": "rmi",
        "logp_var_mean": "logp_var",
        "vote_disagree": "vote_disagree",
    }
    return {
        **{column: _array(_mean(statistics.get(measure), mask)) for column, measure in means.items()},
        "bald_sum": _array((bald.double() * mask).sum(1)),
        "bald_max": _array(_max(bald, mask)),
        "bald_eos": _array(at_last(bald, mask).double()),
        "rmi_seq": _array(rmi_seq(member_logps, mask).double()),
        "ig_seq": _array(ig_seq(member_logps, mask).double()),
    }


def token_columns(
    completions: Completions, logps: Tensor, entropy: Tensor, statistics: Statistics | None
) -> dict[str, list[list[Any]]]:
    """Arrays with one value a valid token, for `--tokens`; null at tokens that are not the assistant's."""
    measured = {"token_logp": logps, "token_entropy": entropy}
    if statistics is not None:
        measured |= {"token_bald": statistics.get("bald"), "token_rmi": statistics.get("rmi")}
    counts = completions.completion_mask.sum(1).tolist()
    policy = completions.policy_mask.tolist()
    return {"token_ids": completions.completion_token_ids()} | {
        name: [
            [value if is_own else None for value, is_own in zip(row[:count], own[:count], strict=True)]
            for row, own, count in zip(values.tolist(), policy, counts, strict=True)
        ]
        for name, values in measured.items()
    }


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values.double() * mask).sum(1) / mask.sum(1)


def _max(values: Tensor, mask: Tensor) -> Tensor:
    return values.double().masked_fill(~mask, -torch.inf).amax(1)


def _array(values: Tensor) -> NDArray[Any]:
    return np.asarray(values.cpu())
