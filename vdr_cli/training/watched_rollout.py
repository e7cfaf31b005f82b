"""Sampling for training whose layers' output the ensemble uses again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from vdr_cli.disagreement.reader import EnsembleReader
from vdr_cli.rollout.base import Rollout
from vdr_cli.samples import Completions, Finished, Sampling, Watcher


@dataclass(frozen=True)
class WatchedRollout:
    """A rollout that lets the ensemble watch what `begin` samples; `generate`, which evaluates, is not watched."""

    rollout: Rollout
    ensemble: EnsembleReader

    def refresh(self, model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        self.rollout.refresh(model, prompts, sampling)

    def generate(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        keys: Sequence[int],
        finished: Finished | None = None,
        watcher: Watcher | None = None,
    ) -> Completions:
        return self.rollout.generate(model, prompts, n, sampling, keys, finished, watcher)

    def begin(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        keys: Sequence[int],
        finished: Finished | None = None,
        watcher: Watcher | None = None,
    ) -> Callable[[], Completions]:
        """The ensemble watches in place of `watcher`, which must be None."""
        if watcher is not None:
            raise ValueError("the ensemble watches this rollout: give no other watcher")
        widest = max(map(len, prompts), default=0)
        with self.ensemble.watching(model, len(prompts) * (widest + n * sampling.max_new_tokens)) as watched:
            wait = self.rollout.begin(model, prompts, n, sampling, keys, finished, watched)
        if watched is None:
            return wait
        known = watched

        def completed() -> Completions:
            known.completions = wait()
            return known.completions

        return completed
