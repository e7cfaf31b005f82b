"""The policy in train mode without any noise: it computes what eval mode does."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vdr_cli.errors import ConfigError
from vdr_cli.models.anatomy import backbone, forward_arguments, has_experts, output_head, position_ids, unwrapped
from vdr_cli.system.text import first_line

NOISE_NAMES = ("drop", "jitter")
"""Parts of the names of float attributes that add noise in train mode: attn_pdrop, hidden_dropout, layerdrop,
router_jitter_noise ..."""

TOKENS = 8


def silence_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, so that train mode computes what eval mode does.

    The policy loss runs in train mode because Hugging Face gradient checkpointing is off in eval mode, and
    dropout there would make the ratio of unchanged weights differ from 1. Dropout modules get p = 0. Modules
    that call F.dropout themselves keep the probability as a float attribute (attention_dropout, OPT's dropout
    and layerdrop, Mixtral's jitter_noise) or read it from their config (Falcon), so floats of such
    names are set to 0 on modules and configs; an exported config.json therefore says 0 as well.
    """
    for holder, name, _ in list(_noise(model)):
        setattr(holder, name, 0.0)


@torch.no_grad()
def check_train_mode(model: nn.Module) -> None:
    """Raise ConfigError unless train mode without dropout gives the logits of eval mode.

    It finds noise under names that `silence_dropout` does not know. model: in eval mode, and not silenced; it is left
    as it was found. Half-precision mixtures of experts are passed over: rounding may send a token to another expert.
    """
    dtype = output_head(model).weight.dtype
    if dtype != torch.float32 and has_experts(model):
        return
    kind, expected = type(unwrapped(model)).__name__, _logits(model)
    found = list(_noise(model))
    try:
        silence_dropout(model)
        model.train()
        logits = _logits(model)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ConfigError(f"model: {kind} cannot be read in train mode ({first_line(error)})") from error
    finally:
        model.eval()
        for holder, name, value in found:
            setattr(holder, name, value)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    if (logits - expected).abs().max() > tolerance * expected.abs().max():
        raise ConfigError(
            f"model: {kind} computes something else in train mode than in eval mode, even "
            "with every dropout that vdr finds at 0: the update would read another model than the one that samples; "
            "set its noise to 0 in its config.json or code, under names with 'drop' vdr does it itself"
        )


def _noise(model: nn.Module) -> Iterator[tuple[object, str, float]]:
    """(holder, attribute, value) of everything that adds noise in train mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            yield module, "p", module.p
        for holder in (module, getattr(module, "config", None)):
            for name, value in vars(holder).items() if holder is not None else ():
                if isinstance(value, float) and any(part in name for part in NOISE_NAMES):
                    yield holder, name, value


def _logits(model: nn.Module) -> Tensor:
    """(TOKENS, V) float32 logits of some tokens."""
    head = output_head(model)
    ids = (7 * torch.arange(TOKENS, device=head.weight.device)[None] + 3) % head.weight.shape[0]
    mask = torch.ones_like(ids)
    arguments = forward_arguments(model, mask, position_ids(mask))
    return head.logits(backbone(model)(input_ids=ids, use_cache=False, **arguments)[0])[0].float()
