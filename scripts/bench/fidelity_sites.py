"""Two other places for dropout, read the plain way: token embeddings, and attention probabilities as the original code.

Members of `vdr` drop the residual branches. These two lose against them (docs/fidelity.md) and exist to be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from vdr_cli.disagreement.hooks import hooked
from vdr_cli.disagreement.information import Statistics, from_logits
from vdr_cli.disagreement.masks import EnsembleSpec, member_mask, token_mask
from vdr_cli.models import anatomy
from vdr_cli.samples import Completions

SITES = ("embedding", "attention")
NAME = "vdr_masked_probabilities"


@torch.no_grad()
def measure_at(site: str, model: nn.Module, batch: Completions, spec: EnsembleSpec, measures: set[str]) -> Statistics:
    """The measures (B, T) of members that drop at this site: one row and one member after the other."""
    found = {name: torch.zeros(batch.completion_ids.shape) for name in measures}
    members_at = dropped_embeddings if site == "embedding" else dropped_probabilities
    for row in range(len(batch)):
        prompt = batch.prompt_ids[row][batch.prompt_mask[row]]
        answer = batch.completion_ids[row][batch.completion_mask[row]]
        logits = []
        for member in range(spec.members):
            with members_at(model, spec, member):
                read = anatomy.unwrapped(model)(input_ids=torch.cat([prompt, answer])[None])[0]
            logits.append(read[0, len(prompt) - 1 : -1].float())  # (t, V)
        for name, values in from_logits(torch.stack(logits, 1), answer, measures).items():
            found[name][row, : len(answer)] = values
    return Statistics(**found)


@contextmanager
def dropped_embeddings(model: nn.Module, spec: EnsembleSpec, member: int) -> Iterator[None]:
    """Inside the block one mask multiplies every token's embedding."""
    table = anatomy.input_embeddings(model)
    mask = member_mask(spec, 0, member, 0, "embedding", table.weight.shape[1])
    with hooked(table.register_forward_hook, lambda module, arguments, output: output * mask):
        yield


@contextmanager
def dropped_probabilities(model: nn.Module, spec: EnsembleSpec, member: int) -> Iterator[None]:
    """Inside the block the probabilities between two positions are dropped for all sequences alike."""
    attentions = [anatomy.residual_blocks(layer)[0] for layer in anatomy.decoder_layers(model)]
    for layer, module in enumerate(attentions):
        module.member_probabilities = spec, member, layer
    try:
        with anatomy.attention_replaced(model, NAME):
            yield
    finally:
        for module in attentions:
            del module.member_probabilities


def masked_attention(
    module: Any,
    query: Tensor,  # (1, H, W, d)
    key: Tensor,  # (1, H / groups, W, d)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, with the member's mask between softmax and values."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = torch.softmax(scores, -1)
    spec, member, layer = module.member_probabilities
    heads, width = probabilities.shape[1:3]
    drawn = [token_mask(spec, 0, member, layer, "probabilities", str(q), width, heads) for q in range(width)]
    dropped = (probabilities * torch.stack(drawn).permute(2, 0, 1)).to(value.dtype)  # (1, H, W, W)
    return (dropped @ value).transpose(1, 2).contiguous(), dropped


AttentionInterface.register(NAME, masked_attention)
AttentionMaskInterface.register(NAME, eager_mask)
