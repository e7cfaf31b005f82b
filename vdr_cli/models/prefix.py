"""Keys and values of a prompt, kept once and read by every completion of its group."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from vdr_cli.models import anatomy

KEY_VALUE_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})
"""Entries of a configuration's layer_types that remember keys and values and nothing else."""


class RepeatedPrompts:
    """Prompts whose completions are next to each other: what the layers of a `PrefixCache` have in common.

    Layers refer to it and not to the cache: in a reference cycle keys and values would stay in memory until Python's
    garbage collector runs.
    """

    def __init__(self) -> None:
        self.width: int | None = None
        """Tokens of the padded prompts; None while prompts are read."""
        self._buffers: dict[str, Tensor] = {}

    def joined(self, name: str, prompt: Tensor, own: Tensor) -> Tensor:
        """(R, H, P, d) and (B, H, T, d) to (B, H, P + T, d), every prompt repeated over its B / R rows.

        Written into one buffer for all layers: a layer has used its keys before the next one asks for its own.
        """
        rows, heads, length, width = own.shape
        shape = (rows, heads, prompt.shape[-2] + length, width)
        kept = self._buffers.get(name)
        if kept is None or kept.shape != shape or kept.dtype != own.dtype:
            kept = self._buffers[name] = own.new_empty(shape)
        kept.view(prompt.shape[0], -1, *shape[1:])[..., : prompt.shape[-2], :] = prompt.unsqueeze(1)
        kept[..., prompt.shape[-2] :, :] = own
        return kept


class _PrefixLayer(DynamicLayer):
    """Keeps the prompt's keys and values, hands them out in front of each completion's own."""

    def __init__(self, prompts: RepeatedPrompts) -> None:
        super().__init__()
        self.prompts = prompts

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.prompts.width is None:
            self.keys, self.values = key_states, value_states
            self.is_initialized = True
            return key_states, value_states
        joined = self.prompts.joined
        return joined("keys", self.keys, key_states), joined("values", self.values, value_states)

    def get_seq_length(self) -> int:
        return self.prompts.width or 0


class PrefixCache(Cache):
    """A key-value cache that the prompt pass writes and completion passes only read, once `prompts.width` is set.

    Layers with a sliding window work too: they see all keys, and the mask that the model builds holds the window.
    """

    def __init__(self, layers: int, prompts: RepeatedPrompts) -> None:
        self.prompts = prompts
        super().__init__(layers=[_PrefixLayer(prompts) for _ in range(layers)])


def shares_prompts(model: nn.Module) -> bool:
    """True if keys and values are all that the model remembers of a prompt.

    Not so with state-space and other recurrent layers, nor where layers use each other's keys: these models read
    prompt and completion together.
    """
    config = anatomy.text_config(model)
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ["attention"])
    stateful = bool(getattr(anatomy.unwrapped(model), "_is_stateful", False))
    return kinds <= KEY_VALUE_LAYERS and not stateful and layers_stand_alone(model)


def layers_stand_alone(model: nn.Module) -> bool:
    """True if a layer needs nothing from the layers below it but the hidden state."""
    return not getattr(anatomy.text_config(model), "num_kv_shared_layers", 0)
