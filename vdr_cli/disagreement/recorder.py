"""What leaves the layers below the members' while completions are sampled.

Sampling puts every token but a completion's last through the whole model, at the weights that the members read with.
With scope last_k this is all that the members need of the layers below theirs: nothing is left to be read again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from vdr_cli.disagreement.hooks import first_layer, hooked
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.models import anatomy
from vdr_cli.models.prefix import shares_prompts

MOST_BYTES = 2**29
"""Bytes of recorded states on a rank, which for a moment exist twice, beyond which they are made again instead.

From prompts and settings alone, so that a resumed run does what the first one did.
"""


class StemRecorder:
    """Watches a `Rollout.generate` in this process: hidden states of the layer below the members', as they come."""

    def __init__(self, below: nn.Module) -> None:
        self.below = below
        self.others: int | None = None
        self.prompts: list[tuple[Tensor, Tensor]] = []  # prompts of the call (N,), their states (N, P', D)
        self.tokens: list[tuple[Tensor, int, Tensor]] = []  # rows of the call (r,), token t, its states (r, D)
        self.seen: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block the model is sampled from."""

        def keep(module: nn.Module, arguments: object, output: Any) -> None:
            self.others = len(output) - 1 if isinstance(output, tuple) else None
            self.seen = output[0] if isinstance(output, tuple) else output

        with hooked(self.below.register_forward_hook, keep):
            yield

    def prompts_were_read(self, prompts: Tensor) -> None:
        self.prompts.append((prompts, self._taken()))

    def token_was_read(self, rows: Tensor, t: int) -> None:
        self.tokens.append((rows, t, self._taken()[:, 0]))

    def _taken(self) -> Tensor:
        assert self.seen is not None
        taken, self.seen = self.seen, None
        return taken

    def states(self, prompts: int, width: int, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """(prompts, P, D), right-aligned, and (rows, T, D); 0 where nothing was read. To be called once: pieces go."""
        first = self.prompts[0][1]
        of_prompts = first.new_zeros(prompts, width, first.shape[-1])
        of_tokens = first.new_zeros(rows, length, first.shape[-1])
        while self.prompts:
            which, states = self.prompts.pop(0)
            of_prompts[which.to(first.device), width - states.shape[1] :] = states
        while self.tokens:
            which, t, states = self.tokens.pop(0)
            if t < length:
                of_tokens[which.to(first.device), t] = states
        return of_prompts, of_tokens


def recorder_of(model: nn.Module, spec: EnsembleSpec, tokens: int) -> StemRecorder | None:
    """For sampling so many tokens, prompts and padding included.

    None where no layers lie below the members', or where it would be too much.
    """
    layers = anatomy.decoder_layers(model)
    first = first_layer(len(layers), spec)
    size = tokens * anatomy.text_config(model).hidden_size * anatomy.output_head(model).weight.element_size()
    if first == 0 or not shares_prompts(model) or size > MOST_BYTES:
        return None
    return StemRecorder(layers[first - 1])
