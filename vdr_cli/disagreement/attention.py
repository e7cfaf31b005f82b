"""Dropout on attention probabilities, one fixed mask a member: only to compare with the original code.

It is no sample of the weights, since attention probabilities are activations; nothing recommends it but history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from vdr_cli.errors import ConfigError
from vdr_cli.models import anatomy

NAME = "vdr_masked_probabilities"
ProbabilityMask = Callable[[int, Tensor], Tensor]
"""(layer, probabilities (rows, H, W, K)) to a mask of that shape."""


def _masked_attention(
    module: Any,
    query: Tensor,  # (rows, H, W, d)
    key: Tensor,  # (rows, H / groups, K, d)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, with the members' masks between softmax and values."""
    if others.get("s_aux") is not None:
        raise ConfigError("disagreement.site: attention is not available with attention sinks; use residual")
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = torch.softmax(scores, -1)
    layer, mask = module.member_probabilities
    dropped = (probabilities * mask(layer, probabilities)).to(value.dtype)
    return (dropped @ value).transpose(1, 2).contiguous(), dropped


AttentionInterface.register(NAME, _masked_attention)
AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def masked_probabilities(
    model: nn.Module, attentions: Sequence[tuple[int, nn.Module]], mask: ProbabilityMask
) -> Iterator[None]:
    """Inside the block these (layer, attention module) drop attention probabilities."""
    causal_lm: Any = anatomy.unwrapped(model)
    if not getattr(causal_lm, "_supports_attention_backend", False):
        raise ConfigError(
            f"disagreement.site: attention is not available for {type(causal_lm).__name__}, whose attention cannot be "
            "exchanged; use residual"
        )
    config = anatomy.text_config(model)
    before = config._attn_implementation
    if before == NAME:
        raise RuntimeError("an ensemble block is already open on this model: its masks would be applied twice")
    try:
        for layer, module in attentions:
            module.member_probabilities = (layer, mask)  # type: ignore[assignment]
        config._attn_implementation = NAME
        yield
    finally:
        config._attn_implementation = before
        for _, module in attentions:
            module.__dict__.pop("member_probabilities", None)
