"""The key-value cache of a decode loop: one prefill a prompt, room for all completions, rows that leave.

Two layouts stand behind transformers' cache protocol. `SharedPromptLayer` keeps each prompt once and only the
completions' own tokens per row; attention then reads a prompt once for its whole group. `ExpandedLayer` copies
the prompt into every row, for whatever attention the model brings along. Layers of other kinds (sliding
windows, linear attention, ...) stay transformers' own.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.cache_utils import DynamicLayer

from vdr_cli.errors import ConfigError
from vdr_cli.models.anatomy import attention_replaced, backbone, text_config

SHARED_PROMPT = "vdr_shared_prompt"
"""Name under which transformers' attention modules find `shared_prompt_attention`."""


class Grouping:
    """The prompt that each row continues, and the gathering of rows by prompt.

    A matrix product over prompts needs rectangular groups: N prompts times c slots, c the largest group.
    """

    def __init__(self, owner: Tensor, prompts: int) -> None:
        """owner: (R,) prompt of each row."""
        self.owner, self.prompts = owner, prompts
        counts = owner.bincount(minlength=prompts)
        self.size = int(counts.max())
        order = owner.argsort(stable=True)
        rank = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner[order]]
        self.place = torch.empty_like(owner)  # (R,) slot of each row
        self.place[order] = owner[order] * self.size + rank
        self.slots = owner.new_zeros(prompts * self.size)  # (N * c,) row in each slot, row 0 where there is none
        rows = torch.arange(len(owner), device=owner.device)
        self.slots[self.place] = rows
        self.in_order = len(owner) == len(self.slots) and bool((self.place == rows).all())

    def by_prompt(self, x: Tensor) -> Tensor:
        """(R, heads, q, E) -> (N, heads, c * q, E)."""
        _, heads, q, E = x.shape
        x = x if self.in_order else x[self.slots]
        return x.view(self.prompts, self.size, heads, q, E).transpose(1, 2).reshape(self.prompts, heads, -1, E)

    def by_row(self, x: Tensor) -> Tensor:
        """(N, heads, c * q, E) -> (R, heads, q, E)."""
        _, heads, cq, E = x.shape
        x = x.view(self.prompts, heads, self.size, -1, E).transpose(1, 2).reshape(-1, heads, cq // self.size, E)
        return x if self.in_order else x[self.place]


class ExpandedLayer(DynamicLayer):
    """Full attention with room for every token: a step writes one column instead of copying the cache.

    keys and values are the filled part of the buffers, (R, heads, length, E), without a copy.
    """

    def __init__(self, keys: Tensor, values: Tensor, owner: Tensor, capacity: int) -> None:
        """keys, values: (N, heads, P, E) of the prompts. owner: (R,) the prompt of each row."""
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.key_buffer = _expanded(keys, owner, capacity)
        self.value_buffer = _expanded(values, owner, capacity)
        self.is_initialized = True
        self._show(owner.shape[0], keys.shape[-2])

    def _show(self, rows: int, length: int) -> None:
        self.keys = self.key_buffer[:rows, :, :length]
        self.values = self.value_buffer[:rows, :, :length]

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        rows, length = self.keys.shape[0], self.keys.shape[-2]
        end = length + key_states.shape[-2]
        self.key_buffer[:rows, :, length:end] = key_states
        self.value_buffer[:rows, :, length:end] = value_states
        self._show(rows, end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order. beam_idx: (r,) transformers' name for row numbers."""
        rows, length = beam_idx.shape[0], self.keys.shape[-2]
        _move(self.keys, beam_idx)
        _move(self.values, beam_idx)
        self._show(rows, length)


class SharedPromptLayer(DynamicLayer):
    """Prompts once, and the completions' own tokens per row.

    prompt_keys (N, heads, E, P) and key_buffer (R, heads, E, T) are stored transposed, as the product with
    the queries wants them. What `update` returns holds the rows' own tokens only and leads
    `shared_prompt_attention` to this layer.
    """

    def __init__(self, keys: Tensor, values: Tensor, grouping: Grouping, bias: Tensor | None, capacity: int) -> None:
        """keys, values: (N, heads, P, E) of the prompts. bias: (N, 1, 1, P), -inf at padding; None without any."""
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.prompt_keys, self.prompt_values = keys.transpose(-1, -2).contiguous(), values
        self.grouping, self.bias = grouping, bias
        rows, heads = len(grouping.owner), keys.shape[1]
        self.key_buffer = keys.new_empty((rows, heads, keys.shape[-1], capacity))
        self.value_buffer = values.new_empty((rows, heads, capacity, values.shape[-1]))
        self.rows, self.length = rows, 0
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        t = self.length
        self.key_buffer[: self.rows, :, :, t] = key_states[:, :, 0]
        self.value_buffer[: self.rows, :, t] = value_states[:, :, 0]
        self.length = t + 1
        self.keys = self.key_buffer[: self.rows, :, :, : t + 1].transpose(-1, -2)
        self.values = self.value_buffer[: self.rows, :, : t + 1]
        keys = self.keys.detach()  # self.keys would close a circle, which only the garbage collector frees
        keys.shared_prompt_layer = self  # type: ignore[attr-defined]
        return keys, self.values

    def get_seq_length(self) -> int:
        return self.prompt_values.shape[-2] + self.length

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """softmax(q [K_prompt, K_own]^T) [V_prompt; V_own] for one new token a row: (R, Hq, 1, E) in and out."""
        R, query_heads, _, E = query.shape
        heads, P = self.prompt_values.shape[1], self.prompt_values.shape[-2]
        q = (query * scaling).view(R, heads, query_heads // heads, E)
        of_prompt = self.grouping.by_prompt(q) @ self.prompt_keys  # (N, heads, c * Hq / heads, P)
        if self.bias is not None:
            of_prompt = of_prompt + self.bias
        of_own = q @ self.keys.transpose(-1, -2)  # (R, heads, Hq / heads, t)
        weights = torch.cat([self.grouping.by_row(of_prompt), of_own], dim=-1).softmax(-1)
        out = weights[..., P:] @ self.values
        out += self.grouping.by_row(self.grouping.by_prompt(weights[..., :P]) @ self.prompt_values)
        return out.view(R, query_heads, 1, -1)


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature; query (R, Hq, 1, E), result (R, 1, Hq, E)."""
    refuse_special_scores(module, kwargs)
    layer: SharedPromptLayer = key.shared_prompt_layer  # type: ignore[attr-defined]
    out = layer.attend(query, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return out.transpose(1, 2), None


def refuse_special_scores(module: nn.Module, arguments: dict[str, Any]) -> None:
    """Raise ConfigError for attention whose scores need more than a scale and a mask."""
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if arguments.get(name) is not None]
    if unknown:
        raise ConfigError(
            f"model.name: {type(module).__name__} needs {unknown[0]}, which sampling here does not have; set "
            "rollout.backend to vllm"
        )


AttentionInterface.register(SHARED_PROMPT, shared_prompt_attention)


class DecodeCache:
    """The prompts' cache turned into the completions': row r continues prompt owner[r]."""

    def __init__(self, model: nn.Module, cache: Cache, owner: Tensor, prompt_mask: Tensor, new_tokens: int) -> None:
        """cache: after the prefill of (N, P) prompts with prompt_mask. new_tokens: room for each completion."""
        self.cache, self.model = cache, model
        N, P = prompt_mask.shape
        self.shared = _can_share(model, cache)
        grouping = Grouping(owner, N) if self.shared else None
        bias = None
        if not bool(prompt_mask.all()):
            bias = torch.zeros(N, 1, 1, P, device=owner.device).masked_fill_(~prompt_mask[:, None, None], -torch.inf)
        for index, layer in enumerate(cache.layers):
            if grouping is not None:
                cache.layers[index] = SharedPromptLayer(layer.keys, layer.values, grouping, bias, new_tokens)
            elif type(layer) is DynamicLayer and layer.is_initialized:
                cache.layers[index] = ExpandedLayer(layer.keys, layer.values, owner, P + new_tokens)
            else:
                layer.reorder_cache(owner)  # which every kind of layer has: it picks any number of rows

    def select(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row that stays where it is costs nothing."""
        if not self.shared:
            self.cache.reorder_cache(indices)
            return
        layers: list[SharedPromptLayer] = self.cache.layers
        grouping = Grouping(layers[0].grouping.owner[indices], layers[0].grouping.prompts)
        for layer in layers:
            _move(layer.key_buffer[..., : layer.length], indices)
            _move(layer.value_buffer[:, :, : layer.length], indices)
            layer.rows, layer.grouping = len(indices), grouping

    def attention(self) -> AbstractContextManager[None]:
        """Inside the block the model reads this cache."""
        return attention_replaced(self.model, SHARED_PROMPT) if self.shared else nullcontext()


def _can_share(model: nn.Module, cache: Cache) -> bool:
    """Float32, and attention that another function can take over.

    Half precision keeps the fused kernel, which holds its scores in float32.
    """
    return has_plain_attention(model, cache) and all(layer.keys.dtype == torch.float32 for layer in cache.layers)


def has_plain_attention(model: nn.Module, cache: Cache) -> bool:
    """Plain full attention in every layer, through transformers' exchangeable attention function.

    Without position ids the positions are in the mask (ALiBi), which such a function does not read. Latent attention
    (DeepSeek's) keeps factors of keys and values in the cache, which the model expands before attention.
    """
    return (
        "position_ids" in inspect.signature(backbone(model).forward).parameters
        and bool(getattr(model, "_supports_attention_backend", False))
        and text_config(model)._attn_implementation == "sdpa"
        and getattr(text_config(model), "kv_lora_rank", None) is None
        and all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)
    )


def _expanded(states: Tensor, owner: Tensor, capacity: int) -> Tensor:
    length = states.shape[-2]
    buffer = states.new_empty((owner.shape[0], states.shape[1], capacity, states.shape[-1]))
    buffer[:, :, :length] = states[owner]
    return buffer


def _move(rows: Tensor, indices: Tensor) -> None:
    """rows[: len(indices)] = rows[indices] in place, touching only rows that change place."""
    to = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
    if len(to):
        rows[to] = rows[indices[to]]


def without_holes(done: Tensor) -> Tensor:
    """(R,) finished rows -> indices of the others, such that the fewest rows move.

    Rows from the end fill the places of finished ones.
    """
    stay = (~done).nonzero()[:, 0]
    holes = done[: len(stay)].nonzero()[:, 0]
    order = torch.arange(len(stay), device=done.device)
    order[holes] = stay[len(stay) - len(holes) :]
    return order
