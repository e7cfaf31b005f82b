"""Answers of completions, for bonuses that count answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vdr_cli.config import Config
from vdr_cli.errors import DataError
from vdr_cli.rewards.base import LoadedReward, listed
from vdr_cli.rewards.calling import accepted_by, arguments_of
from vdr_cli.rewards.classes import solution_classes
from vdr_cli.rewards.exiting import exit_is_an_error
from vdr_cli.rewards.loading import find_function, one_line
from vdr_cli.training.batch import RewardedGroups

Answers = Callable[[RewardedGroups], list[str]]
"""The answer of each completion, as text."""


def answers_of(config: Config, rewards: Sequence[LoadedReward]) -> Answers:
    """bonus.answer; else the solution class that a reward function knows; else the text. White space at the ends aside.

    Raises ConfigError when bonus.answer names no function.
    """
    if config.bonus.answer is not None:
        given = config.bonus.answer
        return _called(f"bonus.answer {given}", find_function(given, "bonus.answer"))

    def by_class(batch: RewardedGroups) -> list[str]:
        found = solution_classes(rewards, batch.prompts, batch.texts, _ids(batch), config.rewards.timeout)
        return [name.strip() for name in found]

    return by_class


def answer_keys(batch: RewardedGroups, answers: Sequence[str]) -> list[int]:
    """(B,) 63-bit hashes of each completion's prompt, as the model reads it, and its answer."""
    keys = []
    for prompt, answer in zip(batch.prompts, answers, strict=True):
        content = np.asarray(prompt.token_ids, dtype="<i8").tobytes() + b"|" + answer.encode(errors="surrogatepass")
        keys.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1)
    return keys


def _called(name: str, function: Callable[..., Any]) -> Answers:
    """A user's function with the signature of a reward function, that returns an answer per completion."""
    wrapped = LoadedReward(name, 0.0, function)

    def answers(batch: RewardedGroups) -> list[str]:
        try:
            with exit_is_an_error():
                arguments = arguments_of(batch.prompts, batch.texts, _ids(batch))
                found = listed(function(**accepted_by(wrapped, arguments)), len(batch))
        except (Exception, SystemExit) as error:
            raise DataError(f"{name} raised: {one_line(error)}") from error
        if not isinstance(found, list) or len(found) != len(batch):
            count = len(found) if isinstance(found, list) else type(found).__name__
            raise DataError(
                f"{name} returned {count}; it must return a list of {len(batch)} answers, one per completion"
            )
        return [str(answer) for answer in found]

    return answers


def _ids(batch: RewardedGroups) -> list[list[int]]:
    completions = batch.completions
    rows = zip(completions.completion_ids, completions.completion_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in rows]
