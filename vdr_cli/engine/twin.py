"""The twin: a hook-free copy of the model that borrows the gathered weights.

Under ZeRO-3 a forward through the engine gathers and releases every layer, and no-grad forwards between
steps destroy its prefetch trace. The twin has the same modules on the meta device; inside `borrowed` its
parameters are the gathered ones, so that rollout and ensemble run any number of forwards, of any length,
without a collective. Below ZeRO-3 the weights are whole already and nothing is gathered.

Where a full copy does not fit, `by_layers` borrows one decoder layer at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from vdr_cli.models.anatomy import WholeLayer, decoder_layers

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
        with self._lent(self._sources, gather):
            yield self.module

    @contextmanager
    def by_layers(self, gather: Gather | None = None) -> Iterator[tuple[Any, WholeLayer]]:
        """(model, lend): all but the decoder layers is whole inside the block, and a layer inside `lend(number)`.

        Embeddings and LM head stay, which are small beside the layers wherever a full copy is too large.
        """
        sources = {id(meta): source for _, _, meta, source in self._slots}
        layers = [[sources[id(meta)] for meta in layer.parameters()] for layer in decoder_layers(self.module)]
        inside = {id(source) for layer in layers for source in layer}
        outside = [source for source in self._sources if id(source) not in inside]
        with self._lent(outside, gather):
            yield self.module, lambda number: self._lent(layers[number], gather)

    @contextmanager
    def on_host(self, gather: Gather | None, wanted: bool) -> Iterator[Any]:
        """The full model in this host's memory, gathered layer by layer; where it is not wanted it stays empty."""
        copies: dict[int, nn.Parameter] = {}

        def keep() -> None:
            for owner, name, _, source in self._slots:
                parameter = owner._parameters[name]
                if wanted and parameter is not None and not parameter.is_meta and id(source) not in copies:
                    copies[id(source)] = nn.Parameter(parameter.detach().cpu().clone(), requires_grad=False)

        with self.by_layers(gather) as (model, lend):
            for number in range(len(decoder_layers(model))):
                with lend(number):
                    keep()
            keep()
        with self._bound(copies):
            yield self.module

    @contextmanager
    def _lent(self, sources: Sequence[nn.Parameter], gather: Gather | None) -> Iterator[None]:
        """Inside the block these parameters of the twin are the gathered ones, afterwards they are empty again."""
        with gather(list(sources)) if gather else nullcontext():
            whole = {id(source): nn.Parameter(source.data, requires_grad=False) for source in sources}
            with self._bound(whole):
                yield

    @contextmanager
    def _bound(self, parameters: dict[int, nn.Parameter]) -> Iterator[None]:
        """Inside the block the twin has these parameters, found by their sources' ids."""
        slots = [slot for slot in self._slots if id(slot[3]) in parameters]
        for owner, name, _, source in slots:
            owner._parameters[name] = parameters[id(source)]
        try:
            yield
        finally:
            for owner, name, meta, _ in slots:
                owner._parameters[name] = meta


def _meta_like(parameter: nn.Parameter) -> nn.Parameter:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"), requires_grad=False)
