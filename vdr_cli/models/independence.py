"""A token's numbers must depend on the tokens before it alone, and on no other row.

Sampling, members and the update batch rows differently, and the log-probability of a token that was seen says nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vdr_cli.errors import ConfigError
from vdr_cli.models.anatomy import backbone, forward_arguments, has_experts, output_head, position_ids, unwrapped
from vdr_cli.models.head import used_entries
from vdr_cli.models.sizes import usable_length
from vdr_cli.system.text import first_line

SHORT = 4
"""Tokens of the row that is compared."""

PROBE_TOKENS = {"cpu": 512, "cuda": 4224}
"""Longest row of the probe: beyond the usual switching points where reading is fast."""

TOLERANCE = 1e-3
"""Largest difference in float32, as a share of the largest logit."""

HALF_TOLERANCE = 0.2
"""The same in bfloat16 and float16."""


@torch.no_grad()
def check_independence(model: nn.Module) -> None:
    """Compare a short row's logits alone, followed by other tokens, and beside a row as long as the model reads.

    ConfigError if they differ: the guard for models that see later tokens (encoders, diffusion models), and for those
    whose forward depends on the longest row of a call in a way that `usable_length` does not know. Half-precision
    mixtures of experts are passed over: rounding may send a token to another expert.
    """
    whole_precision = output_head(model).weight.dtype == torch.float32
    if not whole_precision and has_experts(model):
        return
    length = usable_length(unwrapped(model).config)
    cap = PROBE_TOKENS.get(output_head(model).weight.device.type, PROBE_TOKENS["cuda"])
    longest = cap if length is None else min(length.tokens, cap)
    if longest <= SHORT:
        return
    kind = type(unwrapped(model)).__name__
    try:
        alone = _last_logits(model, SHORT, SHORT)
        followed = _followed_logits(model, min(2 * SHORT, longest))
        beside = _last_logits(model, longest, SHORT)
    except Exception as error:  # whatever an unknown architecture trips over
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ConfigError(
            f"model: {kind} cannot read a row of {SHORT} tokens beside one of {longest} ({first_line(error)}): it does "
            "not take batches of padded rows; use a model that does"
        ) from error
    tolerance = TOLERANCE if whole_precision else HALF_TOLERANCE
    if not (difference := _difference(alone, followed)) <= tolerance:
        raise ConfigError(
            f"model: {kind} lets a token see later ones (logits differ by {difference:.1%} of the largest when "
            "others follow): it does not predict from left to right; give a causal language model"
        )
    if not (difference := _difference(alone, beside)) <= tolerance:
        raise ConfigError(
            f"model: {kind} gives a row other numbers when batched with one of {longest} tokens (logits differ by "
            f"{difference:.1%} of the largest): its positions or its padding depend on the longest row, so that "
            "sampling and training would disagree; use a model that reads each row by itself"
        )


def _difference(logits: Tensor, other: Tensor) -> float:
    """Largest difference of (V,) logits, as a share of the largest of the first."""
    used = used_entries(logits)
    return float((logits - other)[used].abs().max() / logits[used].abs().max().clamp_min(1e-6))


def _followed_logits(model: nn.Module, width: int) -> Tensor:
    """(V,) float32 logits after the same SHORT tokens where others follow, `width` in all."""
    head = output_head(model)
    ids = torch.arange(width, device=head.weight.device)[None] % head.weight.shape[0]
    mask = torch.ones_like(ids)
    hidden = backbone(model)(input_ids=ids, **forward_arguments(model, mask, position_ids(mask)))[0]
    return head.logits(hidden[0, SHORT - 1]).float()


def _last_logits(model: nn.Module, width: int, length: int) -> Tensor:
    """(V,) float32 logits after a row of `length` tokens, left-padded beside a row of `width` tokens."""
    head = output_head(model)
    ids = torch.arange(width, device=head.weight.device).repeat(2, 1) % min(head.weight.shape[0], 64)
    ids[1, width - length :] = torch.arange(length, device=ids.device)
    mask = torch.ones_like(ids)
    mask[1, : width - length] = 0
    arguments = forward_arguments(model, mask, position_ids(mask))
    return head.logits(backbone(model)(input_ids=ids, **arguments)[0][1, -1]).float()
