"""What the layers below the members' give, kept from a pass that is made anyway: sampling, or log-probabilities.

With scope last_k these layers read every completion once, undropped. Sampling in this process has done so already;
otherwise, where the loss needs the policy's own log-probabilities, they come from the same pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vdr_cli.disagreement.hooks import first_layer, hooked
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reading import Batch, Stem
from vdr_cli.disagreement.recorder import StemRecorder
from vdr_cli.models import anatomy
from vdr_cli.models.prefix import shares_prompts
from vdr_cli.models.trees import Places, places_of, unfolded
from vdr_cli.samples import Completions


class StemKeeper:
    """Fills while `policy.completion_logps` reads a batch's rows, and hands out the stems of any of them.

    recorder: what was seen of them before.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: EnsembleSpec,
        completions: Completions,
        group_size: int,
        recorder: StemRecorder | None = None,
    ) -> None:
        layers = anatomy.decoder_layers(model)
        self.layer = first_layer(len(layers), spec)
        self.below: nn.Module | None = layers[self.layer - 1] if self.layer and shares_prompts(model) else None
        self.completions, self.group_size = completions, group_size
        self.others: int | None = None
        self.prompts: Tensor | None = None  # (B / G, P, D)
        self.read: Tensor | None = None  # (B, T, D)
        if recorder is not None and recorder.prompts:
            P, (B, T) = completions.prompt_ids.shape[1], completions.completion_ids.shape
            self.prompts, self.read = recorder.states(B // group_size, P, B, T)
            self.others, self.below = recorder.others, None

    @property
    def is_full(self) -> bool:
        """Whether there are layers below the members' whose passes were kept."""
        return self.read is not None

    @contextmanager
    def keeping(self, rows: slice, prompt_width: int) -> Iterator[None]:
        """Inside the block these rows are read, with prompts of this width: apart, as trees, or the prompts first."""
        if self.below is None:
            yield
            return
        passes: list[Tensor] = []

        def keep(module: nn.Module, arguments: object, output: Any) -> None:
            self.others = len(output) - 1 if isinstance(output, tuple) else None
            passes.append(output[0] if isinstance(output, tuple) else output)

        with hooked(self.below.register_forward_hook, keep):
            yield
        part = self.completions.rows(rows)
        if len(passes) == 2:
            prompts, read = passes
            prompts = prompts[self._places(part, prompts.device).owner]
        elif len(passes[0]) == len(part):
            prompts, read = passes[0][:, :prompt_width], passes[0][:, prompt_width:]
        else:
            places = self._places(part, passes[0].device)
            prompts, read = passes[0][places.owner, :prompt_width], unfolded(passes[0], places)[:, 1:]
        self._take(rows, prompts, read)

    def _places(self, part: Completions, device: torch.device) -> Places:
        part = part.trimmed()
        return places_of(part.prompt_ids.to(device), part.prompt_mask.to(device), part.completion_mask.to(device))

    def _take(self, rows: slice, prompts: Tensor, read: Tensor) -> None:
        """prompts (b, P', D), right-aligned; read (b, T', D)."""
        B, P = self.completions.prompt_ids.shape
        T = self.completions.completion_ids.shape[1]
        if self.prompts is None or self.read is None:
            self.prompts = prompts.new_zeros(B // self.group_size, P, prompts.shape[-1])
            self.read = read.new_zeros(B, T, read.shape[-1])
        self.read[rows, : read.shape[1]] = read
        groups = torch.arange(B, device=read.device)[rows] // self.group_size
        self.prompts[groups, P - prompts.shape[1] :] = prompts

    def of(self, rows: slice, batch: Batch) -> tuple[Stem, ...]:
        """For the passes over these rows, a batch as it was cut from them: the prompts, and completions if any."""
        assert self.prompts is not None and self.read is not None
        c = batch.completions
        groups = slice(rows.start // self.group_size, -(-rows.stop // self.group_size))
        prompts = self.prompts[groups, self.prompts.shape[1] - c.prompt_ids.shape[1] :]
        stems = [Stem(prompts, self.others, self.layer)]
        if c.completion_ids.shape[1] > 1:
            stems.append(Stem(self.read[rows, : c.completion_ids.shape[1] - 1], self.others, self.layer))
        return tuple(stems)
