"""Weights for a sampling server, one decoder layer after another, where no full copy of them is ever made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from vdr_cli.engine import collectives
from vdr_cli.engine.engine import Engine
from vdr_cli.models.anatomy import decoder_layers
from vdr_cli.samples import Completions


class ServedLayers:
    """The policy's weights in the order in which they become whole. Inside `engine.gathered_model()`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def version(self) -> int:
        """Grows when the weights change. No collective."""
        return self._engine.version

    def layers(self, model: Any) -> Iterator[dict[str, Tensor]]:
        """The decoder layers' tensors by their names in the model, each layer whole until the next is asked for.

        Collective: every rank goes through all of them.
        """
        names = {id(module): name for name, module in model.named_modules()}
        with self._engine.whole_layers() as whole_layer:
            for number, layer in enumerate(decoder_layers(model)):
                with whole_layer(number):
                    prefix = names[id(layer)]
                    yield {f"{prefix}.{name}": tensor.detach() for name, tensor in layer.state_dict().items()}

    def on_host(self, main: bool) -> AbstractContextManager[Any]:
        """The full model in the host's memory on rank 0, an empty one elsewhere. Collective."""
        return self._engine.copied_to_host(wanted=main)

    def agreed(self) -> AbstractContextManager[None]:
        """A block whose exception on any rank is raised on all. Collective on exit."""
        return collectives.agreed()

    def read_logps(self, model: Any, completions: Completions, temperature: float) -> Tensor:
        """Log-probabilities (B, T), float32, on the CPU. Collective; ranks may have no completions."""
        return self._engine.read_logps(model, completions, max(len(completions), 1), temperature)[0]
