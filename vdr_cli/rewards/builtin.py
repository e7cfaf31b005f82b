"""Reward functions that come with vdr, by name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from vdr_cli.beds.countdown import countdown
from vdr_cli.beds.gym_verifier import reasoning_gym
from vdr_cli.beds.routes import routes
from vdr_cli.errors import ConfigError
from vdr_cli.rewards.base import completion_text


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

    An `answer` that is missing or cannot be parsed gives None: nothing can be compared with it.
    """
    from math_verify import parse, verify

    scores: list[float | None] = []
    for completion, expected in zip(completions, answer, strict=True):
        # Their time limits are signals, which only the main thread may set; ours is rewards.timeout.
        texts = () if expected is None else (str(expected), f"${expected}$")
        gold = next(filter(None, (parse(text, parsing_timeout=None) for text in texts)), None)
        if not gold:
            scores.append(None)
            continue
        found = parse(completion_text(completion), parsing_timeout=None)
        scores.append(float(verify(gold, found, timeout_seconds=None)))
    return scores


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
