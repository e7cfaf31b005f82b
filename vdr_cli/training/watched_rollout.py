"""Sampling for training whose hidden states are used again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn

from vdr_cli.rollout.base import Rollout, RolloutRequest
from vdr_cli.samples import Completions, Sampling


class Keeper(Protocol):
    """A keeper of hidden states of sampling: the ensemble's reader, or the value heads' (`end_states`)."""

    def watching(self, model: nn.Module, tokens: int) -> AbstractContextManager[Any]:
        """Yields a watcher with a settable `completions`, or None where nothing can be kept."""
        ...


@dataclass(frozen=True)
class WatchedRollout(Rollout):
    """A rollout that lets a keeper watch what `start` samples; `generate`, which evaluates, is not watched."""

    rollout: Rollout
    keeper: Keeper

    def refresh(self, model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        self.rollout.refresh(model, prompts, sampling)

    def rest(self) -> None:
        self.rollout.rest()

    def generate(self, model: nn.Module, request: RolloutRequest) -> Completions:
        return self.rollout.generate(model, request)

    def start(self, model: nn.Module, request: RolloutRequest) -> Callable[[], Completions]:
        """The keeper watches in place of the request's watcher. Raises ValueError when there is one."""
        if request.watcher is not None:
            raise ValueError("this rollout is watched already: give no other watcher")
        widest = max(map(len, request.prompts), default=0)
        tokens = len(request.prompts) * (widest + request.n * request.sampling.max_new_tokens)
        with self.keeper.watching(model, tokens) as watched:
            wait = self.rollout.start(model, replace(request, watcher=watched))
        if watched is None:
            return wait
        known = watched

        def completed() -> Completions:
            known.completions = wait()
            return known.completions

        return completed
