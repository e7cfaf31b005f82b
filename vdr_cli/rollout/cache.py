"""The key-value cache of a decode loop: one prefill a prompt, room for all completions, rows that leave."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """Full attention with room for every token: a step writes one column instead of copying the cache.

    keys and values are the filled part of the buffers, (R, heads, length, D_head), without a copy.
    """

    def __init__(self, keys: Tensor, values: Tensor, owner: Tensor, capacity: int) -> None:
        """keys, values: (N, heads, P, D_head) of the prompts. owner: (R,) the prompt of each row."""
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.key_buffer = _expanded(keys, owner, capacity)
        self.value_buffer = _expanded(values, owner, capacity)
        self.is_initialized = True
        self._show(owner.shape[0], keys.shape[-2])

    def _show(self, rows: int, length: int) -> None:
        self.keys = self.key_buffer[:rows, :, :length]
        self.values = self.value_buffer[:rows, :, :length]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        rows, length = self.keys.shape[0], self.keys.shape[-2]
        end = length + key_states.shape[-2]
        self.key_buffer[:rows, :, length:end] = key_states
        self.value_buffer[:rows, :, length:end] = value_states
        self._show(rows, end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row that stays where it is costs nothing."""
        rows, length = indices.shape[0], self.keys.shape[-2]
        to = (indices != torch.arange(rows, device=indices.device)).nonzero()[:, 0]
        if len(to):
            source = indices[to]
            self.key_buffer[to, :, :length] = self.key_buffer[source, :, :length]
            self.value_buffer[to, :, :length] = self.value_buffer[source, :, :length]
        self._show(rows, length)


def _expanded(states: Tensor, owner: Tensor, capacity: int) -> Tensor:
    length = states.shape[-2]
    buffer = states.new_empty((owner.shape[0], states.shape[1], capacity, states.shape[-1]))
    buffer[:, :, :length] = states[owner]
    return buffer


def expand(cache: Cache, owner: Tensor, capacity: int) -> None:
    """Turn the prompts' cache into the completions': row r continues prompt owner[r], to at most `capacity` tokens.

    Layers of other kinds (sliding windows, ...) stay transformers' own and grow as it defines them.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[index] = PreallocatedLayer(layer.keys, layer.values, owner, capacity)
        else:
            layer.batch_select_indices(owner)


def without_holes(done: Tensor) -> Tensor:
    """(R,) finished rows -> indices of the others, such that the fewest rows move.

    Rows from the end fill the places of finished ones.
    """
    stay = (~done).nonzero()[:, 0]
    holes = done[: len(stay)].nonzero()[:, 0]
    order = torch.arange(len(stay), device=done.device)
    order[holes] = stay[len(stay) - len(holes) :]
    return order
