"""Sampling for training whose layers' output the ensemble uses again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from vdr_cli.disagreement.reader import EnsembleReader
from vdr_cli.rollout.base import Rollout, RolloutRequest
from vdr_cli.samples import Completions, Sampling


@dataclass(frozen=True)
class WatchedRollout(Rollout):
    """A rollout that lets the ensemble watch what `start` samples; `generate`, which evaluates, is not watched."""

    rollout: Rollout
    ensemble: EnsembleReader

    def refresh(self, model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        self.rollout.refresh(model, prompts, sampling)

    def rest(self) -> None:
        self.rollout.rest()

    def generate(self, model: nn.Module, request: RolloutRequest) -> Completions:
        return self.rollout.generate(model, request)

    def start(self, model: nn.Module, request: RolloutRequest) -> Callable[[], Completions]:
        """The ensemble watches in place of the request's watcher. Raises ValueError when there is one."""
        if request.watcher is not None:
            raise ValueError("the ensemble watches this rollout: give no other watcher")
        widest = max(map(len, request.prompts), default=0)
        tokens = len(request.prompts) * (widest + request.n * request.sampling.max_new_tokens)
        with self.ensemble.watching(model, tokens) as watched:
            wait = self.rollout.start(model, replace(request, watcher=watched))
        if watched is None:
            return wait
        known = watched

        def completed() -> Completions:
            known.completions = wait()
            return known.completions

        return completed
