"""A key-value cache at fixed addresses: each token step is the same sequence of kernels, which a CUDA graph can replay.

A step writes its column through an index on the device and attends over whole blocks of columns under a mask, so that
nothing in it depends on the number of tokens so far until the next block begins.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.cache_utils import DynamicLayer

from vdr_cli.models.anatomy import attention_replaced
from vdr_cli.rollout.cache import refuse_special_scores

STATIC = "vdr_static"
"""Name under which transformers' attention modules find `static_attention`."""

BLOCK = 256
"""Columns by which the part of the cache that attention reads grows."""


class Columns:
    """The column that a step writes, and the columns that it reads; shared by all layers."""

    def __init__(self, prompt_mask: Tensor, new_tokens: int, dtype: torch.dtype) -> None:
        """prompt_mask: (R, P) bool of each row's prompt."""
        R, self.prompt_width = prompt_mask.shape
        self.capacity = _whole_blocks(self.prompt_width + new_tokens)
        self.rows, self.length = R, self.prompt_width
        self.index = torch.zeros(1, dtype=torch.int64, device=prompt_mask.device)
        bias = torch.zeros(R, self.capacity, device=prompt_mask.device)
        bias[:, self.prompt_width :] = -torch.inf
        bias[:, : self.prompt_width].masked_fill_(~prompt_mask, -torch.inf)
        self._bias = bias.to(dtype)  # (R, capacity), 0 at columns to read and -inf elsewhere

    @property
    def bias(self) -> Tensor:
        """(R, 1, 1, length) added to the scores."""
        return self._bias[: self.rows, None, None, : self.length]

    def advance(self, t: int) -> None:
        """The next step writes and reads token t."""
        column = self.prompt_width + t
        self.index.fill_(column)
        self._bias[:, column] = 0.0
        self.length = min(_whole_blocks(column + 1), self.capacity)

    def select(self, indices: Tensor) -> None:
        self._bias[: len(indices)] = self._bias[indices]
        self.rows = len(indices)


class StaticLayer(DynamicLayer):
    """Keys and values (R, heads, capacity, E) of prompts and completions, in buffers that stay where they are."""

    def __init__(self, keys: Tensor, values: Tensor, owner: Tensor, columns: Columns) -> None:
        """keys, values: (N, heads, P, E) of the prompts. owner: (R,) the prompt of each row."""
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.columns = columns
        self.key_buffer = _expanded(keys, owner, columns.capacity)
        self.value_buffer = _expanded(values, owner, columns.capacity)
        self.keys, self.values = self.key_buffer, self.value_buffer
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        rows, length = self.columns.rows, self.columns.length
        self.key_buffer[:rows].index_copy_(2, self.columns.index, key_states)
        self.value_buffer[:rows].index_copy_(2, self.columns.index, value_states)
        self.keys, self.values = self.key_buffer[:rows, :, :length], self.value_buffer[:rows, :, :length]
        self.keys.columns = self.columns  # type: ignore[attr-defined]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.columns.length

    def select(self, indices: Tensor) -> None:
        for buffer in (self.key_buffer, self.value_buffer):
            buffer[: len(indices)] = buffer[indices]


def static_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature; query (R, Hq, 1, E), result (R, 1, Hq, E).

    The query heads that share a key head are the queries of one attention, so that no key is read twice.
    """
    refuse_special_scores(module, kwargs)
    R, query_heads, _, E = query.shape
    columns: Columns = key.columns  # type: ignore[attr-defined]
    heads = key.shape[1]
    grouped = query.view(R, heads, query_heads // heads, E)
    bias = columns.bias.expand(R, heads, query_heads // heads, columns.length)
    out = nn.functional.scaled_dot_product_attention(grouped, key, value, bias, scale=scaling)
    return out.reshape(R, 1, query_heads, -1), None


AttentionInterface.register(STATIC, static_attention)


class StaticCache:
    """The prompts' cache turned into the completions', at fixed addresses: row r continues prompt owner[r]."""

    shared = False

    def __init__(self, model: nn.Module, cache: Cache, owner: Tensor, prompt_mask: Tensor, new_tokens: int) -> None:
        """cache: after the prefill of (N, P) prompts with prompt_mask. new_tokens: room for each completion."""
        self.cache, self.model = cache, model
        self.columns = Columns(prompt_mask[owner], new_tokens, cache.layers[0].keys.dtype)
        for index, layer in enumerate(cache.layers):
            cache.layers[index] = StaticLayer(layer.keys, layer.values, owner, self.columns)

    def select(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        self.columns.select(indices)
        for layer in self.cache.layers:
            layer.select(indices)

    def attention(self) -> AbstractContextManager[None]:
        """Inside the block the model reads this cache."""
        return attention_replaced(self.model, STATIC)


def _whole_blocks(columns: int) -> int:
    return -(-columns // BLOCK) * BLOCK


def _expanded(states: Tensor, owner: Tensor, capacity: int) -> Tensor:
    """(N, heads, P, E) to (R, heads, capacity, E); unwritten columns are 0, which a mask can hide and NaN cannot."""
    buffer = states.new_zeros((owner.shape[0], states.shape[1], capacity, states.shape[-1]))
    buffer[:, :, : states.shape[-2]] = states[owner]
    return buffer
