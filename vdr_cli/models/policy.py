"""The policy: a causal language model that returns log-probabilities and entropies of completions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vdr_cli.grpo.logprobs import chunked_logps
from vdr_cli.models.anatomy import Head, backbone, forward_arguments, output_head, position_ids

NOISE_NAMES = ("drop", "jitter")
"""Parts of the names of float attributes that add noise in train mode: attn_pdrop, hidden_dropout, layerdrop,
router_jitter_noise ..."""


class HeadLogps(nn.Module):
    """The LM head applied in chunks. It owns no parameter: the engine registers the head's weight as its external
    parameter, so that ZeRO-3 gathers it around this module's forward and backward."""

    def __init__(self, chunk_tokens: int | None = None) -> None:
        super().__init__()
        self.chunk_tokens = chunk_tokens

    def forward(self, hidden: Tensor, head: Head, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """hidden (N, D), targets (N,) → log-probabilities (N,), entropies (N,)."""
        return chunked_logps(
            hidden, head.weight, head.bias, targets, temperature, head.scale, head.softcap, self.chunk_tokens
        )


class Policy(nn.Module):
    """What the DeepSpeed engine wraps: its forward is all that the loss needs from the model."""

    def __init__(self, causal_lm: nn.Module, chunk_tokens: int | None = None) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.head_logps = HeadLogps(chunk_tokens)

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """prompts (B, P), completions (B, T) → log-probabilities (B, T), entropies (B, T), float32, 0 at padding."""
        hidden = completion_hidden(self.causal_lm, prompt_ids, prompt_mask, completion_ids, completion_mask)
        return _at_valid_tokens(
            self.head_logps, output_head(self.causal_lm), hidden, completion_ids, completion_mask, temperature
        )


def completion_logps(
    causal_lm: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    temperature: float,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Policy.forward for a model outside the engine: the twin, the reference."""
    hidden = completion_hidden(causal_lm, prompt_ids, prompt_mask, completion_ids, completion_mask)
    head_logps = HeadLogps(chunk_tokens)
    return _at_valid_tokens(head_logps, output_head(causal_lm), hidden, completion_ids, completion_mask, temperature)


def completion_hidden(
    causal_lm: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
) -> Tensor:
    """(B, T, D): the hidden states that produced each completion token, at columns P−1 ... P+T−2."""
    ids = torch.cat([prompt_ids, completion_ids], dim=1)  # (B, P+T)
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    arguments: dict[str, Any] = forward_arguments(causal_lm, mask, position_ids(mask))
    hidden = backbone(causal_lm)(input_ids=ids, use_cache=False, **arguments)[0]
    return hidden[:, prompt_ids.shape[1] - 1 : -1]


def _at_valid_tokens(
    head_logps: HeadLogps, head: Head, hidden: Tensor, targets: Tensor, mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Send the valid positions of hidden (B, T, D) through the head and scatter the results to (B, T).

    A batch without valid tokens sends its first position (the end of a prompt, always a real token) and
    multiplies by 0: every rank's backward must reach every parameter, or ZeRO's collectives do not match.
    """
    valid = mask.bool()
    sent = valid if bool(valid.any()) else torch.zeros_like(valid).index_fill_(1, valid.new_zeros(1).long(), True)
    logps, entropy = head_logps(hidden[sent], head, targets[sent], temperature)
    empty = logps.new_zeros(mask.shape)
    keep = valid.to(logps.dtype)
    return empty.masked_scatter(sent, logps) * keep, empty.masked_scatter(sent, entropy) * keep


def silence_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, so that train mode computes what eval mode does.

    The policy loss runs in train mode because Hugging Face gradient checkpointing is off in eval mode, and
    dropout there would make the ratio of unchanged weights differ from 1. Dropout modules get p = 0. Modules
    that call F.dropout themselves keep the probability as a float attribute (attention_dropout, OPT's dropout
    and layerdrop, Mixtral's jitter_noise) or read it from their config (Falcon), so floats of such
    names are set to 0 on modules and configs; an exported config.json therefore says 0 as well.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero_noise(module)
        if hasattr(module, "config"):
            _zero_noise(module.config)


def _zero_noise(holder: object) -> None:
    for name, value in list(vars(holder).items()):
        if isinstance(value, float) and any(part in name for part in NOISE_NAMES):
            setattr(holder, name, 0.0)
