"""Reward functions that come with vdr, by name."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

from vdr_cli.beds.countdown import countdown
from vdr_cli.beds.gym_verifier import reasoning_gym
from vdr_cli.beds.routes import routes
from vdr_cli.errors import ConfigError
from vdr_cli.rewards.base import completion_text

MATH_SECONDS = 3
"""Most time for parsing a text, and for comparing two expressions."""


def exact_match(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    """1 where the completion is the column `answer`, white space at the ends aside, else 0; None without an answer.

    A list of answers is matched by any of them. A whole number that the data hold as a float is found in both
    spellings: pandas writes 42.0 beside an empty cell.
    """
    return [
        None
        if expected is None
        else float(completion is not None and completion_text(completion).strip() in _spellings(expected))
        for completion, expected in zip(completions, answer, strict=True)
    ]


def _spellings(answer: Any) -> list[str]:
    if isinstance(answer, list):
        return [spelling for each in answer for spelling in _spellings(each)]
    whole = [str(int(answer))] if isinstance(answer, float) and answer.is_integer() else []
    return [str(answer).strip(), *whole]


exact_match.judges_answers = True  # type: ignore[attr-defined]


def length(completions: list[Any], target_length: list[float] | None = None, **_: Any) -> list[float]:
    """Characters of the completion; with a column `target_length`: -|characters - target_length|.

    Without the column this is the reward of the original experiments ("longer is better",
    grpo-vdr, scripts/multinode_train.py).
    """
    lengths = [float(len(completion_text(completion))) for completion in completions]
    if target_length is None:
        return lengths
    return [-abs(found - float(wanted)) for found, wanted in zip(lengths, target_length, strict=True)]


def math_verify(completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
    """1 where the completion's final expression equals the column `answer` as mathematics, else 0.

    An `answer` that is missing or cannot be parsed gives None: nothing can be compared with it. An expression that
    takes longer than MATH_SECONDS to parse or to compare (a tower of powers) is not equal. The package's time limits
    are signals, which only a main thread may set: on another one there are none.
    """
    from math_verify import parse, verify

    limit = MATH_SECONDS if threading.current_thread() is threading.main_thread() else None

    @cache
    def gold_of(expected: str) -> Any:
        return next(filter(None, (parse(text, parsing_timeout=limit) for text in (expected, f"${expected}$"))), None)

    @cache
    def score(expected: str, text: str) -> float:
        return float(verify(gold_of(expected), parse(text, parsing_timeout=limit), timeout_seconds=limit))

    return [
        None if expected is None or not gold_of(str(expected)) else score(str(expected), completion_text(completion))
        for completion, expected in zip(completions, answer, strict=True)
    ]


math_verify.needs_main_thread = True  # type: ignore[attr-defined]


BUILT_IN: dict[str, Callable[..., Any]] = {
    "countdown": countdown,
    "exact_match": exact_match,
    "length": length,
    "math_verify": math_verify,
    "reasoning_gym": reasoning_gym,
    "routes": routes,
}


def built_in(name: str) -> Callable[..., Any]:
    """The built-in function of this name. ConfigError when it needs a package that is not there."""
    if name == "math_verify":
        try:
            import math_verify as _  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "rewards.functions: math_verify needs the package math-verify; pip install math-verify"
            ) from error
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off
    return BUILT_IN[name]
