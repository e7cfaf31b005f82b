"""The ensemble watches what is sampled for training, and nothing that is sampled for an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.samples import Sampling
from vdr_cli.training.watched_rollout import WatchedRollout

PROMPTS = [[1, 2, 3], [4]]
REQUEST = RolloutRequest(PROMPTS, 4, Sampling(max_new_tokens=5), [0, 1])


class Rollout:
    """Says what it was given."""

    def generate(self, model: Any, request: RolloutRequest) -> Any:
        return ("generated", request.watcher)

    def start(self, model: Any, request: RolloutRequest) -> Any:
        return lambda: ("started", request.watcher)


class Ensemble:
    """Watches with a keeper of completions, or declines."""

    def __init__(self, keeper: Any) -> None:
        self.keeper = keeper
        self.tokens: list[int] = []

    @contextmanager
    def watching(self, model: Any, tokens: int) -> Iterator[Any]:
        self.tokens.append(tokens)
        yield self.keeper


def watched(keeper: Any) -> tuple[Any, Ensemble]:
    ensemble: Any = Ensemble(keeper)
    rollout: Any = Rollout()
    return WatchedRollout(rollout, ensemble), ensemble


def test_what_is_started_is_watched_and_its_completions_are_kept() -> None:
    keeper = SimpleNamespace(completions=None)
    rollout, ensemble = watched(keeper)
    wait = rollout.start(None, REQUEST)
    assert ensemble.tokens == [2 * (3 + 4 * 5)], "the longest prompt and every completion at full length"
    assert keeper.completions is None, "nothing is there before it is waited for"
    assert wait() == ("started", keeper) == keeper.completions


def test_an_ensemble_that_declines_changes_nothing() -> None:
    rollout, _ = watched(None)
    assert rollout.start(None, REQUEST)() == ("started", None)


def test_an_evaluation_is_not_watched() -> None:
    rollout, ensemble = watched(SimpleNamespace(completions=None))
    assert rollout.generate(None, REQUEST) == ("generated", None)
    assert ensemble.tokens == []


def test_two_watchers_are_one_too_many() -> None:
    rollout, _ = watched(None)
    with pytest.raises(ValueError, match="the ensemble watches this rollout"):
        rollout.start(None, replace(REQUEST, watcher=object()))
