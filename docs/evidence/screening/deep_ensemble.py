"""A bonus from independently trained models: what disagreement would pay with the most faithful members there are.

    bonus.source: docs/evidence/screening/deep_ensemble.py:rmi (or :residual)

Reads the eight starters that scripts/bench/validity.py compares with, from $DEEP_ENSEMBLE (directories 1 to 8).
They stay as they are: unlike dropout members they do not follow the policy.
"""

from __future__ import annotations

import os
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@cache
def ensemble() -> tuple[Any, list[Any]]:
    """The tokenizer and the models."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = Path(os.environ["DEEP_ENSEMBLE"])
    models = [AutoModelForCausalLM.from_pretrained(where / str(n), dtype=torch.float32).eval() for n in range(1, 9)]
    return AutoTokenizer.from_pretrained(where / "1", padding_side="left"), models


def member_logps(prompts: list[str], ids: Tensor, masks: Tensor) -> Tensor:
    """(M, B, T): log-probability of every token under every model, 0 at padding."""
    tokenizer, models = ensemble()
    read = tokenizer(prompts, return_tensors="pt", padding=True)
    everything = torch.cat([read["input_ids"], ids], 1)
    mask = torch.cat([read["attention_mask"], masks.long()], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = []
    for model in models:
        logits = model(input_ids=everything, attention_mask=mask, position_ids=positions).logits
        logps = logits[:, -ids.shape[1] - 1 : -1].log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        found.append(torch.where(masks, logps, 0.0))
    return torch.stack(found)


@torch.no_grad()
def rmi(prompts: list[str], ids: Tensor, masks: Tensor) -> Tensor:
    """(B,) nats: mean over a completion's tokens of log mean_m p_m(y_t) - mean_m log p_m(y_t)."""
    logps = member_logps(prompts, ids, masks)
    per_token = logps.logsumexp(0) - torch.tensor(float(len(logps))).log() - logps.mean(0)
    return torch.where(masks, per_token, 0.0).sum(1) / masks.sum(1)


def residual(prompts: list[str], ids: Tensor, masks: Tensor, log_probs: Tensor, entropies: Tensor) -> Tensor:
    """(B,) the part of `rmi` that log-probability, entropy and length do not explain.

    It is what a least-squares fit on their deviations from the means of this step's groups leaves, in float64.
    """
    length = masks.sum(1).double()
    means = [torch.where(masks, values, 0.0).double().sum(1) / length for values in (log_probs, entropies)]
    groups = torch.tensor([n for n, (_, rows) in enumerate(groupby(prompts)) for _ in rows])
    centred = [within(values, groups) for values in (rmi(prompts, ids, masks).double(), *means, length)]
    explained = torch.stack(centred[1:], 1)
    fit = torch.linalg.lstsq(explained, centred[0][:, None], driver="gelsd").solution
    return centred[0] - (explained @ fit)[:, 0]


def within(values: Tensor, groups: Tensor) -> Tensor:
    """The values less the mean of their group."""
    sums = torch.zeros(int(groups.max()) + 1, dtype=values.dtype).index_add(0, groups, values)
    return values - (sums / groups.bincount())[groups]
