"""The gathered model: a hook-free copy of the model whose parameters are the gathered ones.

Under ZeRO-3 a forward through the engine gathers and releases every layer, and no-grad forwards between steps destroy
its prefetch trace. The gathered model has the same modules on the meta device. Inside `whole_model` its parameters are
the gathered ones, so that rollout and ensemble run any number of forwards, of any length, without a collective. Below
ZeRO-3 the weights are whole already and nothing is gathered.

Where a full copy does not fit, `layer_by_layer` makes one decoder layer whole at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from vdr_cli.models.anatomy import WholeLayer, decoder_layers

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]
"""Makes partitioned parameters whole inside the block, on every rank. Collective."""


class GatheredModel:
    """Made from a model before its engine exists (no hooks yet); shows that model's parameters on demand."""

    def __init__(self, model: nn.Module, device: torch.device, gather: Gather | None) -> None:
        """gather: None when the model's parameters are whole on every rank."""
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
        self._sources, self._gather = sources, gather

    @contextmanager
    def whole_model(self) -> Iterator[Any]:
        """The full model in eval mode. Collective on entry when there is something to gather."""
        with self._gathered(self._sources):
            yield self.module

    @contextmanager
    def layer_by_layer(self) -> Iterator[tuple[Any, WholeLayer]]:
        """(model, whole_layer): all but the decoder layers is whole inside the block, a layer in `whole_layer(number)`.

        Embeddings and LM head stay; they are small beside the layers wherever a full copy is too large. Plain forwards
        of the model work too: each makes its layers whole one after another, so every rank must make as many.
        """
        meta_sources = {id(meta): source for _, _, meta, source in self._slots}
        layers = [[meta_sources[id(meta)] for meta in layer.parameters()] for layer in decoder_layers(self.module)]
        inside = {id(source) for layer in layers for source in layer}
        outside = [source for source in self._sources if id(source) not in inside]
        with self._gathered(outside), ExitStack() as stack:
            walker = _LayerWalker(lambda number: self._gathered(layers[number]))
            for number, layer in enumerate(decoder_layers(self.module)):
                stack.enter_context(walker.gathering(number, layer))
            yield self.module, walker.whole_layer

    @contextmanager
    def on_host(self, wanted: bool) -> Iterator[Any]:
        """The full model in this host's memory, gathered layer by layer. Collective.

        wanted: False on ranks that only take part: their model stays empty.
        """
        with self.layer_by_layer() as (_, whole_layer), self.copied_to_host(whole_layer, wanted) as model:
            yield model

    @contextmanager
    def copied_to_host(self, whole_layer: WholeLayer, wanted: bool) -> Iterator[Any]:
        """`on_host` inside `layer_by_layer`. Collective."""
        copies: dict[int, nn.Parameter] = {}

        def keep() -> None:
            for owner, name, _, source in self._slots:
                parameter = owner._parameters[name]
                if wanted and parameter is not None and not parameter.is_meta and id(source) not in copies:
                    copies[id(source)] = nn.Parameter(parameter.detach().cpu().clone(), requires_grad=False)

        keep()
        for number in range(len(decoder_layers(self.module))):
            with whole_layer(number):
                keep()
        with self._bound(copies):
            yield self.module

    @contextmanager
    def _gathered(self, sources: Sequence[nn.Parameter]) -> Iterator[None]:
        """Inside the block these parameters are the gathered ones; afterwards they are empty again."""
        with self._gather(list(sources)) if self._gather else nullcontext():
            whole = {id(source): nn.Parameter(source.data, requires_grad=False) for source in sources}
            with self._bound(whole):
                yield

    @contextmanager
    def _bound(self, parameters: dict[int, nn.Parameter]) -> Iterator[None]:
        """Inside the block the model has these parameters, found by their sources' ids, afterwards what it had."""
        slots = [(owner, name, id(source)) for owner, name, _, source in self._slots if id(source) in parameters]
        before = [owner._parameters[name] for owner, name, _ in slots]
        for owner, name, source in slots:
            owner._parameters[name] = parameters[source]
        try:
            yield
        finally:
            for (owner, name, _), parameter in zip(slots, before, strict=True):
                owner._parameters[name] = parameter


class _LayerWalker:
    """Makes layers whole for whoever asks: a walk through the layers, or a plain forward."""

    def __init__(self, gather: WholeLayer) -> None:
        self._gather = gather
        self._whole: set[int] = set()

    @contextmanager
    def whole_layer(self, number: int) -> Iterator[None]:
        """Inside the block this layer is whole, and forwards use it without a gather of their own. Collective."""
        with self._gather(number):
            self._whole.add(number)
            try:
                yield
            finally:
                self._whole.discard(number)

    @contextmanager
    def gathering(self, number: int, layer: Any) -> Iterator[None]:
        """Inside the block a forward of the layer makes it whole first, unless it is."""
        before, forward = layer.__dict__.get("forward"), layer.forward

        def run(*arguments: Any, **keywords: Any) -> Any:
            if number in self._whole:
                return forward(*arguments, **keywords)
            with self._gather(number):
                return forward(*arguments, **keywords)

        layer.forward = run
        try:
            yield
        finally:
            if before is None:
                del layer.forward
            else:
                layer.forward = before


def _meta_like(parameter: nn.Parameter) -> nn.Parameter:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"), requires_grad=False)
