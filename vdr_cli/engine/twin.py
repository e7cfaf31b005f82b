"""The twin: a hook-free copy of the model that borrows the gathered weights.

Under ZeRO-3 a forward through the engine gathers and releases every layer, and no-grad forwards between
steps destroy its prefetch trace. The twin has the same modules on the meta device; inside `borrowed` its
parameters are the gathered ones, so that rollout and ensemble run any number of forwards, of any length,
without a collective. Below ZeRO-3 the weights are whole already and nothing is gathered.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


class Twin:
    """Made from a model before its engine exists (no hooks yet); borrows that model's parameters on demand."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        sources = list(model.parameters())
        memo: dict[int, Any] = {id(source): _meta_like(source) for source in sources}
        metas = {id(memo[id(source)]): source for source in sources}
        self.module = copy.deepcopy(model, memo).eval()
        for owner in self.module.modules():
            for name, buffer in owner._buffers.items():
                owner._buffers[name] = None if buffer is None else buffer.to(device)
        # Ties are kept: one meta parameter that stands in several places is one source in all of them.
        self._slots = [
            (owner, name, parameter, metas[id(parameter)])
            for owner in self.module.modules()
            for name, parameter in owner._parameters.items()
            if parameter is not None
        ]
        self._sources = sources

    @contextmanager
    def borrowed(self, gather: Gather | None = None) -> Iterator[Any]:
        """The full model in eval mode. `gather` makes partitioned parameters whole meanwhile (a collective)."""
        with gather(self._sources) if gather else nullcontext():
            whole = {id(source): nn.Parameter(source.data, requires_grad=False) for source in self._sources}
            for owner, name, _, source in self._slots:
                owner._parameters[name] = whole[id(source)]
            try:
                yield self.module
            finally:
                for owner, name, meta, _ in self._slots:
                    owner._parameters[name] = meta


def _meta_like(parameter: nn.Parameter) -> nn.Parameter:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"), requires_grad=False)
