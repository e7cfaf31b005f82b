"""A row's numbers must not depend on the rows beside it: sampling, members and the update batch it differently."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vdr_cli.errors import ConfigError
from vdr_cli.models.anatomy import backbone, forward_arguments, has_experts, output_head, position_ids, unwrapped
from vdr_cli.models.head import used_entries
from vdr_cli.models.sizes import usable_length

SHORT = 4
"""Tokens of the row that is compared."""

PROBE_TOKENS = {"cpu": 512, "cuda": 4224}
"""Longest row of the probe: beyond the usual switching points where reading is fast."""

TOLERANCE = {torch.float32: 1e-3}
"""Largest difference, as a share of the largest logit; other dtypes: HALF_TOLERANCE."""

HALF_TOLERANCE = 0.2


@torch.no_grad()
def check_independence(model: nn.Module) -> None:
    """Compare a short row's logits alone and beside a row as long as the model reads; ConfigError if they differ.

    The guard for models whose forward depends on the longest row of a call in a way that `usable_length` does not
    know. Half-precision mixtures of experts are passed over: rounding may send a token to another expert.
    """
    dtype = output_head(model).weight.dtype
    if dtype not in TOLERANCE and has_experts(model):
        return
    length = usable_length(unwrapped(model).config)
    cap = PROBE_TOKENS.get(output_head(model).weight.device.type, PROBE_TOKENS["cuda"])
    longest = cap if length is None else min(length.tokens, cap)
    if longest <= SHORT:
        return
    alone, beside = _last_logits(model, SHORT, SHORT), _last_logits(model, longest, SHORT)
    used = used_entries(alone)
    difference = float((alone - beside)[used].abs().max() / alone[used].abs().max().clamp_min(1e-6))
    if not difference <= TOLERANCE.get(dtype, HALF_TOLERANCE):
        raise ConfigError(
            f"model: {type(unwrapped(model)).__name__} gives a row other numbers when batched with one of {longest} "
            f"tokens (logits differ by {difference:.1%} of the largest): its positions or its padding depend on the "
            "longest row, so that sampling and training would disagree; use a model that reads each row by itself"
        )


def _last_logits(model: nn.Module, width: int, length: int) -> Tensor:
    """(V,) float32 logits after a row of `length` tokens, left-padded beside a row of `width` tokens."""
    head = output_head(model)
    ids = torch.arange(width, device=head.weight.device).repeat(2, 1) % min(head.weight.shape[0], 64)
    ids[1, width - length :] = torch.arange(length, device=ids.device)
    mask = torch.ones_like(ids)
    mask[1, : width - length] = 0
    arguments = forward_arguments(model, mask, position_ids(mask))
    return head.logits(backbone(model)(input_ids=ids, **arguments)[0][1, -1]).float()
