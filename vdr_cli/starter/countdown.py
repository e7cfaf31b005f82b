"""Countdown with three numbers: the embedded task.

A problem is three numbers from 1 to 9 and a target from 0 to 99. An answer combines each number
exactly once with + - *, without parentheses, under the usual precedence. Nothing here is drawn at
random: the problems are enumerated, and a hash decides their split and order, so every machine has
the same prompts.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

HELD_OUT = 256  # problems of the test split

_EXPRESSION = re.compile(r"[0-9]{1,4}(?:[-+*][0-9]{1,4})*", re.ASCII)


@dataclass(frozen=True, order=True)
class Problem:
    """What makes two prompts the same problem: the sorted numbers and the target."""

    numbers: tuple[int, ...]
    target: int


def evaluate(expression: str) -> tuple[list[int], int] | None:
    """The numbers of an expression in order and its value; None when it is not one.

    The grammar is sum = product (("+" | "-") product)*, product = number ("*" number)*; spaces are
    ignored. Model text is only matched against it, never executed.
    """
    text = expression.replace(" ", "")
    if len(text) > 64 or not _EXPRESSION.fullmatch(text):
        return None
    numbers: list[int] = []
    value = 0
    for sign, product in re.findall(r"([-+]?)([0-9*]+)", text):
        factors = [int(factor) for factor in product.split("*")]
        numbers += factors
        term = 1
        for factor in factors:
            term *= factor
        value += -term if sign == "-" else term
    return numbers, value


def is_solution(expression: str, numbers: Sequence[int], target: int) -> bool:
    """Whether the expression uses each number exactly once and gives the target."""
    found = evaluate(expression)
    return found is not None and sorted(found[0]) == sorted(numbers) and found[1] == target


def countdown(completions: list[Any], numbers: list[Sequence[int]], target: list[int], **_: Any) -> list[float]:
    """Reward 1 for a completion that solves its problem, else 0. Columns: `numbers`, `target`, also as a CSV's text."""
    rows = zip(completions, map(_whole_numbers, numbers), map(int, target), strict=True)
    return [float(is_solution(_text(completion), row_numbers, goal)) for completion, row_numbers, goal in rows]


@cache
def expressions(numbers: tuple[int, ...]) -> list[str]:
    """Every distinct expression that uses each number exactly once."""
    orders = sorted(set(itertools.permutations(numbers)))
    signs = list(itertools.product("+-*", repeat=len(numbers) - 1))
    return [
        "".join(f"{number}{sign}" for number, sign in zip(order, (*gaps, ""), strict=True))
        for order in orders
        for gaps in signs
    ]


@cache
def solutions() -> dict[Problem, tuple[str, ...]]:
    """Every problem that has an answer, with all its answers."""
    found: dict[Problem, list[str]] = {}
    for numbers in itertools.combinations_with_replacement(range(1, 10), 3):
        for expression in expressions(numbers):
            parsed = evaluate(expression)
            if parsed is not None and 0 <= parsed[1] <= 99:
                found.setdefault(Problem(numbers, parsed[1]), []).append(expression)
    return {problem: tuple(answers) for problem, answers in sorted(found.items())}


@cache
def problems(split: str) -> tuple[Problem, ...]:
    """The problems of `train` or `test`: disjoint sets of (sorted numbers, target), in a hashed order."""
    if split not in ("train", "test"):
        raise KeyError(split)
    shuffled = sorted(solutions(), key=_digest)
    return tuple(shuffled[:HELD_OUT] if split == "test" else shuffled[HELD_OUT:])


def prompt(numbers: Sequence[int], target: int) -> str:
    """The prompt of a problem with its numbers in this order, e.g. `3 5 7=22:`."""
    return f"{' '.join(map(str, numbers))}={target}:"


def rows(split: str) -> list[dict[str, Any]]:
    """Dataset rows of `train` or `test`: prompt, numbers, target."""
    found = []
    for problem in problems(split):
        orders = sorted(set(itertools.permutations(problem.numbers)))
        numbers = list(orders[int(_digest(problem), 16) % len(orders)])
        found.append({"prompt": prompt(numbers, problem.target), "numbers": numbers, "target": problem.target})
    return found


def _digest(problem: Problem) -> str:
    return hashlib.blake2b(f"{problem.numbers}{problem.target}".encode(), digest_size=8).hexdigest()


def _whole_numbers(value: Any) -> list[int]:
    """`[3, 5, 7]`, or the numbers in the text `3 5 7`."""
    return [int(number) for number in (re.findall(r"\d+", value) if isinstance(value, str) else value)]


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
