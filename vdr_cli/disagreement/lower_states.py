"""Hidden states that leave the layers below the members', and a cache of them that sampling fills.

Sampling puts every token but a completion's last through the whole model, with the weights that the members read with.
With scope last_k this is all that the members need from the layers below theirs, so nothing is read twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vdr_cli.disagreement.hooks import first_layer, hooked
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.models import anatomy
from vdr_cli.models.prefix import shares_prompts
from vdr_cli.samples import Completions

MOST_BYTES = 2**29
"""Largest cache on a rank, in bytes; while it is put in order it takes twice that. Larger batches are read again.

The size follows from prompts and settings alone, so a resumed run decides as the first one did.
"""


@dataclass(frozen=True)
class LowerStates:
    """Hidden states that enter a layer, for each row of a pass, or for each row and member."""

    hidden: Tensor  # (R, W, D), or (m · R, W, D)
    extra_outputs: int | None
    """Layers return a tuple with this many entries after the hidden state; None: the hidden state alone."""
    layer: int
    """Number of the layer that they enter."""


def split_output(output: Any) -> tuple[Tensor, int | None]:
    """A layer's output as (hidden state, number of extra outputs); None: the layer returns no tuple."""
    return (output[0], len(output) - 1) if isinstance(output, tuple) else (output, None)


class LowerStateCache:
    """Collects the states that enter `layer` while a model in this process samples (a `samples.Watcher`).

    Afterwards it hands out the states of any rows of those completions. It keeps the dtype and device of the model.
    """

    def __init__(self, below: nn.Module, layer: int) -> None:
        """below: the decoder layer under the members' first one, which is number `layer`."""
        self.below, self.layer = below, layer
        self.completions: Completions | None = None
        """The sampled completions, once they are known."""
        self.seen: Tensor | None = None
        self._extra_outputs: int | None = None
        self._of_prompts: list[tuple[Tensor, Tensor]] = []  # prompts of the call (N,), their states (N, P', D)
        self._of_tokens: list[tuple[Tensor, int, Tensor]] = []  # rows of the call (r,), token t, its states (r, D)
        self._arranged: tuple[Tensor, Tensor] | None = None  # (B / G, P, D), right-aligned, and (B, T, D)

    @property
    def has_states(self) -> bool:
        """False where a server sampled: it reads elsewhere."""
        return bool(self._of_prompts) or self._arranged is not None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block the model samples."""

        def keep(module: nn.Module, arguments: object, output: Any) -> None:
            self.seen, self._extra_outputs = split_output(output)

        with hooked(self.below.register_forward_hook, keep):
            yield

    def prompts_were_read(self, prompts: Tensor) -> None:
        """prompts (N,): indices in the call."""
        self._of_prompts.append((prompts, self._taken()))

    def token_was_read(self, rows: Tensor, t: int) -> None:
        """rows (r,): indices in the call; t: the completion token that was read."""
        self._of_tokens.append((rows, t, self._taken()[:, 0]))

    def _taken(self) -> Tensor:
        assert self.seen is not None
        taken, self.seen = self.seen, None
        return taken

    def states_of(self, rows: slice, part: Completions, group_size: int) -> tuple[LowerStates, ...]:
        """States for the passes over these rows, which `part` holds without common padding.

        Gives the prompts' states, and the completions' where more than one token is read. group_size: of the whole
        batch. Empty when nothing was seen.
        """
        if not self.has_states:
            return ()
        prompts, tokens = self._in_order(group_size)
        P, T = part.prompt_ids.shape[1], part.completion_ids.shape[1]
        groups = slice(rows.start // group_size, -(-rows.stop // group_size))
        found = [prompts[groups, prompts.shape[1] - P :]]
        if T > 1:
            found.append(tokens[rows, : T - 1])
        return tuple(LowerStates(hidden, self._extra_outputs, self.layer) for hidden in found)

    def _in_order(self, group_size: int) -> tuple[Tensor, Tensor]:
        """(B / G, P, D) and (B, T, D); 0 where nothing was read. The collected pieces are freed on the way."""
        if self._arranged is None:
            assert self.completions is not None
            P, (B, T) = self.completions.prompt_ids.shape[1], self.completions.completion_ids.shape
            first = self._of_prompts[0][1]
            prompts = first.new_zeros(B // group_size, P, first.shape[-1])
            tokens = first.new_zeros(B, T, first.shape[-1])
            while self._of_prompts:
                which, states = self._of_prompts.pop(0)
                prompts[which.to(first.device), P - states.shape[1] :] = states
            while self._of_tokens:
                which, t, states = self._of_tokens.pop(0)
                if t < T:
                    tokens[which.to(first.device), t] = states
            self._arranged = prompts, tokens
        return self._arranged


def cache_for(model: nn.Module, spec: EnsembleSpec, tokens: int) -> LowerStateCache | None:
    """A cache for sampling `tokens` tokens, prompts and padding included.

    None where no layers lie below the members', where prompts are not read apart, or beyond MOST_BYTES.
    """
    layers = anatomy.decoder_layers(model)
    first = first_layer(len(layers), spec)
    size = tokens * anatomy.text_config(model).hidden_size * anatomy.output_head(model).weight.element_size()
    if first == 0 or not shares_prompts(model) or size > MOST_BYTES:
        return None
    return LowerStateCache(layers[first - 1], first)
