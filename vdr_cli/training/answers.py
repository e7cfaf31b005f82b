"""Answers of completions, for bonuses that count answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextvars import copy_context

import numpy as np

from vdr_cli.config import Config
from vdr_cli.rewards.base import LoadedReward
from vdr_cli.rewards.classes import entries_of, solution_classes
from vdr_cli.rewards.loading import find_function
from vdr_cli.rewards.main_thread import OwnProcess, watch_signals
from vdr_cli.training.batch import RewardedGroups

Answers = Callable[[RewardedGroups], list[str]]
"""The answer of each completion, as text."""


def answers_of(config: Config, rewards: Sequence[LoadedReward]) -> Answers:
    """bonus.answer; else the solution class that a reward function knows; else the text. White space at the ends aside.

    Raises ConfigError when bonus.answer names no function.
    """
    if config.bonus.answer is not None:
        given = config.bonus.answer
        watch_signals()
        user = find_function(given, "bonus.answer")
        function = LoadedReward(
            given, 0.0, user, own_process=OwnProcess(given), context=copy_context(), role="bonus.answer"
        )

        def by_function(batch: RewardedGroups) -> list[str]:
            found = entries_of(
                function, batch.prompts, batch.texts, batch.completions.completion_token_ids(), config.rewards.timeout
            )
            return [str(answer) for answer in found]

        return by_function

    def by_class(batch: RewardedGroups) -> list[str]:
        found = solution_classes(
            rewards, batch.prompts, batch.texts, batch.completions.completion_token_ids(), config.rewards.timeout
        )
        return [name.strip() for name in found]

    return by_class


def answer_keys(batch: RewardedGroups, answers: Sequence[str]) -> list[int]:
    """(B,) 63-bit hashes of each completion's prompt, as the model reads it, and its answer."""
    keys = []
    for prompt, answer in zip(batch.prompts, answers, strict=True):
        content = np.asarray(prompt.token_ids, dtype="<i8").tobytes() + b"|" + answer.encode(errors="surrogatepass")
        keys.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1)
    return keys
