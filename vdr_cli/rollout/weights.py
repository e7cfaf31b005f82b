"""The policy's weights as a directory that a sampling server loads, and a number that tells versions apart."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from vdr_cli.models.adapters import merged
from vdr_cli.models.anatomy import decoder_layers
from vdr_cli.system.files import replacing

WEIGHTS = "model.safetensors"
ALWAYS_TIED = ("gemma", "gemma2")
"""Models that vLLM gives no LM head of their own: it reads logits off the embedding."""


def checksum(model: nn.Module) -> int:
    """Sum of all parameters' bits as 16-bit numbers, weighted by the parameter's place: one read of the weights."""
    total = 0
    for place, parameter in enumerate(model.parameters(), start=1):
        total += place * int(parameter.detach().flatten().view(torch.int16).sum(dtype=torch.int64))
    return total


def write_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Configuration and tokenizer of the served model, beside its weights.

    The embedding and the LM head are two tensors here even where the policy ties them: a reload of tied
    weights leaves vLLM's LM head at the old ones.
    """
    directory.mkdir(parents=True, exist_ok=True)
    whole = merged(model)
    config = copy.deepcopy(whole.config)
    config.tie_word_embeddings = config.model_type in ALWAYS_TIED
    config.dtype = next(whole.parameters()).dtype
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    write_weights(model, directory)


def served_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the served model under its name in a checkpoint, the LM head too where it is the embedding.

    Where the model is gathered layer by layer (layers on the meta device) names are those in memory, which differ for
    mixtures of experts.
    """
    whole = merged(model)
    state: dict[str, Tensor] = {name: tensor.detach() for name, tensor in whole.state_dict().items()}
    head = whole.get_output_embeddings()
    names = {id(module): name for name, module in whole.named_modules()}
    if head is not None:
        name = f"{names[id(head)]}.weight"
        state[name] = head.weight.detach()
        if whole.config.model_type in ALWAYS_TIED:
            del state[name]
    if any(tensor.is_meta for tensor in state.values()):
        return state
    in_checkpoint: dict[str, Tensor] = revert_weight_conversion(whole, state)
    return in_checkpoint


def in_layer_order(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights as they are sent from a model that is gathered layer by layer: its layers first, then the others.

    weights: as `served_weights` gives them, on the meta device in the layers.
    """
    names = {id(module): name for name, module in model.named_modules()}
    layers = [f"{names[id(layer)]}.{name}" for layer in decoder_layers(model) for name in layer.state_dict()]
    return {name: weights[name] for name in layers} | {name: t for name, t in weights.items() if not t.is_meta}


def write_weights(model: nn.Module, directory: Path) -> None:
    """Replace the weights in `directory` in one move: a reader sees the old file or the new one."""
    with replacing(directory / WEIGHTS) as partial:
        save_file(_unshared(served_weights(model)), partial, metadata={"format": "pt"})


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor with memory of its own, as the file format wants it."""
    seen: set[int] = set()
    out = {}
    for name, tensor in state.items():
        whole = tensor.contiguous()
        out[name] = whole.clone() if whole.data_ptr() in seen else whole
        seen.add(whole.data_ptr())
    return out
