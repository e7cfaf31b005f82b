"""The twin where no full copy fits: every forward gathers and releases the decoder layers one after another.

A gather needs all ranks, and ranks make different numbers of forwards. So a rank that starts a forward announces it,
one that has come to another collective announces that instead, and while anybody still has a forward to make the
others gather along with empty hands. A forward of one rank is therefore a forward of all: slow, but always possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from vdr_cli.engine import collectives
from vdr_cli.models.anatomy import WholeLayer, backbone, decoder_layers


class Rounds:
    """One forward after another, in step with the other ranks."""

    def __init__(self, layers: int, lend: WholeLayer) -> None:
        self.layers, self.lend = layers, lend
        self.next = 0
        """The layer that the ranks gather next in this round."""
        self.by_hand = False
        """Somebody else lends the layers, so forwards announce and gather nothing."""

    def forward(self, trunk: Callable[..., Any]) -> Callable[..., Any]:
        """A trunk that announces each of its forwards, and whatever happens in one gathers to the last layer."""

        def run(*arguments: Any, **keywords: Any) -> Any:
            if self.by_hand:
                return trunk(*arguments, **keywords)
            collectives.announce(busy=True)
            self.next = 0
            try:
                return trunk(*arguments, **keywords)
            finally:
                self._gather_along()

        return run

    def layer(self, number: int, layer: Callable[..., Any]) -> Callable[..., Any]:
        """A layer that is whole while it runs."""

        def run(*arguments: Any, **keywords: Any) -> Any:
            if self.by_hand:
                return layer(*arguments, **keywords)
            if number != self.next:
                raise RuntimeError(f"layer {number} ran where layer {self.next} was expected")
            self.next += 1
            with self.lend(number):
                return layer(*arguments, **keywords)

        return run

    def settle(self) -> None:
        """Before any other collective: gather along until every rank has come to it."""
        while collectives.announce(busy=False):
            self.next = 0
            self._gather_along()

    @contextmanager
    def one_by_one(self) -> Iterator[WholeLayer]:
        """Every rank enters the block and lends every layer once, in order: for layer-major work. Collective."""
        collectives.settle()
        self.by_hand = True
        try:
            yield self.lend
        finally:
            self.by_hand = False

    def _gather_along(self) -> None:
        while self.next < self.layers:
            self.next += 1
            with self.lend(self.next - 1):
                pass


@contextmanager
def gathering_by_itself(model: nn.Module, lend: WholeLayer) -> Iterator[Rounds]:
    """Inside the block the model's forwards work, though its layers are not whole between them. Collective."""
    layers = decoder_layers(model)
    rounds = Rounds(len(layers), lend)
    with ExitStack() as stack:
        trunk = backbone(model)
        stack.enter_context(_replaced(trunk, rounds.forward(trunk.forward)))
        for number, layer in enumerate(layers):
            stack.enter_context(_replaced(layer, rounds.layer(number, layer.forward)))
        stack.enter_context(collectives.settling(rounds.settle))
        yield rounds


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
