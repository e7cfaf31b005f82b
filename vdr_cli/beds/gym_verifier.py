"""The verifiers of reasoning-gym as a reward function. Model text never reaches Python's evaluator.

Some of the package's verifiers call `eval` on an answer, or sympy's parser, which does so inside. There literals alone
are read, and an answer for the parser may hold numbers, operators and the names of mathematics.
"""

from __future__ import annotations

import ast
import logging
import re
import sys
from typing import Any

from vdr_cli.beds.gym import entry_of, generator

logger = logging.getLogger(__name__)

LONGEST = 10_000
"""Characters of an answer beyond which it is wrong: no reference answer is near it."""

ARITHMETIC = ("countdown", "puzzle24")
ALGEBRA = ("simple_integration", "intermediate_integration", "polynomial_multiplication")
"""With ARITHMETIC, the tasks whose answers sympy parses."""
_EVALUATING = ("string_insertion", "spiral_matrix", "binary_matrix", "n_queens")
"""Modules of the package that call `eval` on an answer."""
_NAMES = (
    "sin",
    "cos",
    "tan",
    "sinh",
    "cosh",
    "tanh",
    "asin",
    "acos",
    "atan",
    "exp",
    "log",
    "ln",
    "sqrt",
    "pi",
    "Integral",
)
_NAME = re.compile(r"[^\W\d]\w*")
_CHARACTERS = re.compile(r"[\w\s+\-*/^().,]*", re.ASCII)
_POWER = re.compile(r"\*\*\s*(?!(?:\d{1,3}|\(\s*-?\d{1,3}(?:\s*/\s*\d{1,3})?\s*\))(?![\w.])(?!\s*\*\*))")
_NUMBERS = re.compile(r"(?:[\d\s+\-/().]|(?<!\*)\*(?!\*))*", re.ASCII)
_ATTRIBUTE_OR_CALL = re.compile(r"\.\s*[^\W\d]|[^\W\d]\w*\s*\.|\b[^\W\d]\s*\(")

_warned: set[str] = set()


def reasoning_gym(
    completions: list[Any], task: list[str], settings: list[str], index: list[int], **_: Any
) -> list[float]:
    """The score that the task's own verifier gives each answer, mostly from 0 to 1. None is a missing answer.

    Columns: those of rows that `beds.gym` makes. An answer on which the verifier raises scores 0.
    """
    rows = zip(completions, task, settings, index, strict=True)
    return [score(_text(completion), name, text, int(number)) for completion, name, text, number in rows]


reasoning_gym.judges_answers = True  # type: ignore[attr-defined]


def solution_class(completions: list[Any], **_: Any) -> list[str | None]:
    """The answer of each completion."""
    return [_text(completion) for completion in completions]


def score(answer: str | None, task: str, settings: str, index: int) -> float:
    """The verifier's score of one answer. settings, index: as rows hold them."""
    verifier = generator(task, settings)
    _disarm()
    if answer is not None and (len(answer) > LONGEST or not is_harmless(answer, task)):
        answer = None
    try:
        return float(verifier.score_answer(answer=answer, entry=entry_of(task, settings, index)))
    except Exception as error:  # an answer that the package's author did not think of
        if task not in _warned:
            _warned.add(task)
            name = type(error).__name__
            logger.warning("the verifier of reasoning-gym's %s raised %s on an answer, which scores 0", task, name)
        return 0.0


def is_harmless(answer: str, task: str) -> bool:
    """True for what the task's verifier may read.

    For sympy's parser: numbers and operators; in algebra also one-letter names, the names of mathematics, and powers of
    at most three digits.
    """
    if task in ARITHMETIC:
        return bool(_NUMBERS.fullmatch(answer))
    return task not in ALGEBRA or bool(
        _CHARACTERS.fullmatch(answer)
        and all(len(name) == 1 or name in _NAMES for name in _NAME.findall(answer))
        and not _ATTRIBUTE_OR_CALL.search(answer)
        and not _POWER.search(answer)
    )


def _disarm() -> None:
    """`eval` of these modules reads literals: a list of lists is what they expect."""
    for name in _EVALUATING:
        for package in ("algorithmic", "games"):
            module = sys.modules.get(f"reasoning_gym.{package}.{name}")
            if module is not None:
                vars(module)["eval"] = ast.literal_eval


def _text(completion: Any) -> str | None:
    """The answer, white space at its ends aside; None where extraction found none."""
    if completion is None or isinstance(completion, str):
        return None if completion is None else completion.strip()
    return str(completion[-1]["content"]).strip()
