"""Hidden states at the ends of completions, kept while they are sampled in this process: no forward of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vdr_cli.disagreement.hooks import hooked
from vdr_cli.disagreement.lower_states import MOST_BYTES
from vdr_cli.models import anatomy
from vdr_cli.models.prefix import shares_prompts
from vdr_cli.samples import Completions, last_token


class EndStates:
    """The last hidden state of every token that a model reads while it samples (a `samples.Watcher`)."""

    def __init__(self) -> None:
        self.completions: Completions | None = None
        """The sampled completions, once they are known."""
        self.seen: Tensor | None = None
        self._of_prompts: list[tuple[Tensor, Tensor]] = []  # prompts of the call (N,), their last states (N, D)
        self._of_tokens: list[tuple[Tensor, int, Tensor]] = []  # rows of the call (r,), token t, its states (r, D)

    @property
    def has_states(self) -> bool:
        """False where a server sampled: it reads elsewhere."""
        return bool(self._of_prompts)

    def keep(self, module: nn.Module, arguments: object, output: Any) -> None:
        """A forward hook of the trunk, whose output (N, W, D) comes first."""
        self.seen = output[0]

    def prompts_were_read(self, prompts: Tensor) -> None:
        """prompts (N,): indices in the call."""
        self._of_prompts.append((prompts, self._taken()))

    def token_was_read(self, rows: Tensor, t: int) -> None:
        """rows (r,): indices in the call; t: the completion token that was read."""
        self._of_tokens.append((rows, t, self._taken()))

    def _taken(self) -> Tensor:
        assert self.seen is not None
        taken, self.seen = self.seen[:, -1].clone(), None
        return taken

    def at_ends(self) -> Tensor:
        """(B, D) float32 on the CPU: the state that predicts the policy's last token of each completion."""
        assert self.completions is not None
        ends_at = last_token(self.completions.policy_mask)
        prompts_of_call = 1 + max(int(prompts.max()) for prompts, _ in self._of_prompts)  # some are read for each batch
        size = len(ends_at) // prompts_of_call
        found = torch.zeros(len(ends_at), self._of_prompts[0][1].shape[1])
        for prompts, states in self._of_prompts:
            for number in range(size):
                found[prompts * size + number] = states.float().cpu()
        for rows, t, states in self._of_tokens:
            ends = ends_at[rows] == t + 1
            found[rows[ends]] = states[ends.to(states.device)].float().cpu()
        return found


class EndStateKeeper:
    """Watches sampling for `training.watched_rollout`, and hands out what the newest completions left."""

    def __init__(self) -> None:
        self._newest: EndStates | None = None

    @contextmanager
    def watching(self, model: nn.Module, tokens: int) -> Iterator[EndStates | None]:
        """Inside the block `model` samples at most `tokens` tokens, prompts and padding included.

        Yields the watcher to sample with, whose `completions` must be set before `of` is asked. None where prompts are
        not read apart from their completions, and beyond MOST_BYTES.
        """
        size = tokens * anatomy.text_config(model).hidden_size * anatomy.output_head(model).weight.element_size()
        if size > MOST_BYTES or not shares_prompts(model):
            yield None
            return
        states = EndStates()
        with hooked(anatomy.backbone(model).register_forward_hook, states.keep):
            yield states
        if states.has_states:
            self._newest = states

    def of(self, completions: Completions) -> Tensor | None:
        """`EndStates.at_ends` of these completions; None when sampling has not left them. Once."""
        newest, self._newest = self._newest, None
        return newest.at_ends() if newest is not None and newest.completions is completions else None
