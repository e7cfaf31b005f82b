"""The ensemble watches what is begun for training, and nothing that is generated for an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from vdr_cli.samples import Sampling
from vdr_cli.training.watched_rollout import WatchedRollout

PROMPTS = [[1, 2, 3], [4]]


class Rollout:
    """Says what it was given."""

    def generate(self, *arguments: Any) -> Any:
        return ("generated", arguments[-1])

    def begin(self, *arguments: Any) -> Any:
        return lambda: ("begun", arguments[-1])


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


def test_what_is_begun_is_watched_and_its_completions_are_kept() -> None:
    keeper = SimpleNamespace(completions=None)
    rollout, ensemble = watched(keeper)
    wait = rollout.begin(None, PROMPTS, 4, Sampling(max_new_tokens=5), [0, 1])
    assert ensemble.tokens == [2 * (3 + 4 * 5)], "the longest prompt and every completion at full length"
    assert keeper.completions is None, "nothing is there before it is waited for"
    assert wait() == ("begun", keeper) == keeper.completions


def test_an_ensemble_that_declines_changes_nothing() -> None:
    rollout, _ = watched(None)
    assert rollout.begin(None, PROMPTS, 4, Sampling(max_new_tokens=5), [0, 1])() == ("begun", None)


def test_an_evaluation_is_not_watched() -> None:
    rollout, ensemble = watched(SimpleNamespace(completions=None))
    assert rollout.generate(None, PROMPTS, 4, Sampling(max_new_tokens=5), [0, 1]) == ("generated", None)
    assert ensemble.tokens == []


def test_two_watchers_are_one_too_many() -> None:
    rollout, _ = watched(None)
    with pytest.raises(ValueError, match="the ensemble watches this rollout"):
        rollout.begin(None, PROMPTS, 4, Sampling(max_new_tokens=5), [0, 1], None, object())
