"""From logits to tokens: transformers' distributions, one random stream a completion."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vdr_cli.samples import Sampling

BLOCK = 256
"""Tokens summed in float32 before float64 takes over: 1e-7 of a block's mass, and one cheap pass over V."""

BELOW_ONE = 1.0 - 2.0**-40
"""Largest uniform used, so that rounding never reaches past the last token with probability."""


def processors(sampling: Sampling) -> LogitsProcessorList:
    """transformers' own processors in the order in which its generate applies them.

    At temperature 0 the filters cannot change which token is likeliest, so only the penalty remains.
    """
    found = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(penalty=sampling.repetition_penalty))
    if sampling.temperature == 0:
        return found
    if sampling.temperature != 1.0:
        found.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        found.append(TopKLogitsWarper(top_k=sampling.top_k))
    if sampling.top_p < 1.0:
        found.append(TopPLogitsWarper(top_p=sampling.top_p))
    if sampling.min_p > 0:
        found.append(MinPLogitsWarper(min_p=sampling.min_p))
    return found


def greedy(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Likeliest token and its log-probability at temperature 1.

    scores: (R, V) float32 after the processors. Returns (R,) int64 and (R,) float32.
    """
    top, tokens = scores.max(dim=-1, keepdim=True)
    return tokens[:, 0], -(scores - top).logsumexp(dim=-1)


def inverse_cdf(scores: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw token y = min{v : F(v) > u}, F the cumulative softmax of the scores, and return log p(y).

    One uniform a token. F is walked in two levels, blocks and then the tokens of one block, both summed
    in float64. scores: (R, V) float32 after the processors (-inf where filtered). uniform: (R,) float64.
    Returns (R,) int64 and (R,) float32. Scores that are NaN give some token and a log-probability of NaN, which
    makes the step be refused.
    """
    R, V = scores.shape
    top = scores.amax(dim=-1, keepdim=True)
    weights = (scores - top).exp_()
    size = min(BLOCK, V)
    if V % size:
        weights = torch.nn.functional.pad(weights, (0, -V % size))
    weights = weights.view(R, -1, size)
    block_cdf = weights.sum(-1).double().cumsum(-1)  # (R, V / BLOCK)
    total = block_cdf[:, -1:]
    target = uniform.clamp_max(BELOW_ONE)[:, None] * total
    block = torch.searchsorted(block_cdf, target, right=True).clamp_max(block_cdf.shape[1] - 1)  # (R, 1)
    before = torch.where(block > 0, block_cdf.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = weights.gather(1, block[..., None].expand(-1, -1, size))[:, 0]  # (R, size)
    cdf = inside.double().cumsum(-1)
    share = (target - before) / (block_cdf.gather(1, block) - before)
    offset = torch.searchsorted(cdf, share.clamp_max(BELOW_ONE) * cdf[:, -1:], right=True)
    tokens = (block * size + offset)[:, 0].clamp_max(V - 1)
    logps = scores.gather(1, tokens[:, None]) - top - total.log().float()
    return tokens, logps[:, 0]
