"""Countdown: combine the given numbers to reach the target. `starter` has three numbers, `countdown4` four.

A problem is some numbers from 1 to 9 and a target from 0 to 99. An answer combines each number
exactly once with + - *, without parentheses, under the usual precedence. Nothing here is drawn at
random: the problems are enumerated, and a hash decides their split and order, so every machine has
the same prompts.

The solution class of an answer is its expression up to commutation and association: a sum of signed
products, in which neither the order of the terms nor that of a term's factors counts.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

HELD_OUT = 256  # problems of the test split
MOST_ENUMERATED = 6  # numbers whose classes take milliseconds
LEAST_CLASSES = {3: 1, 4: 2}  # solution classes of a problem, by how many numbers it has

_EXPRESSION = re.compile(r"[0-9]{1,4}(?:[-+*][0-9]{1,4})*", re.ASCII)

Term = tuple[bool, tuple[int, ...]]
"""Subtracted or not, and the sorted factors."""


@dataclass(frozen=True, order=True)
class Problem:
    """The identity of a problem: the sorted numbers and the target."""

    numbers: tuple[int, ...]
    target: int


def terms(expression: str) -> list[Term] | None:
    """The signed products that an expression adds up, in its order; None when it is not an expression.

    The grammar is sum = product (("+" | "-") product)*, product = number ("*" number)*; spaces are
    ignored. Model text is only matched against it, never executed.
    """
    text = expression.replace(" ", "")
    if len(text) > 64 or not _EXPRESSION.fullmatch(text):
        return None
    return [
        (sign == "-", tuple(int(factor) for factor in product.split("*")))
        for sign, product in re.findall(r"([-+]?)([0-9*]+)", text)
    ]


def evaluate(expression: str) -> tuple[list[int], int] | None:
    """The numbers of an expression in order and its value; None when it is not one."""
    found = terms(expression)
    if found is None:
        return None
    numbers = [factor for _, factors in found for factor in factors]
    return numbers, _total(found)


def canonical(expression: str) -> str | None:
    """The one spelling of all expressions that differ by commutation and association: `5-2+4*3` is `3*4+5-2`.

    Factors rise within a term; added terms come first, then the subtracted ones, each in rising order of their
    factors. The first term of an expression has no sign, so at least one term is added. None when it is none.
    """
    found = terms(expression)
    if found is None:
        return None
    return _spelled([(minus, tuple(sorted(factors))) for minus, factors in found])


def is_solution(expression: str, numbers: Sequence[int], target: int) -> bool:
    """True when the expression uses each number exactly once and gives the target."""
    found = evaluate(expression)
    return found is not None and sorted(found[0]) == sorted(numbers) and found[1] == target


def countdown(completions: list[Any], numbers: list[Sequence[int]], target: list[int], **_: Any) -> list[float]:
    """Reward 1 for a completion that solves its problem, else 0. Columns: `numbers`, `target`, also as a CSV's text."""
    rows = zip(completions, map(_whole_numbers, numbers), map(int, target), strict=True)
    return [float(is_solution(_text(completion), row_numbers, goal)) for completion, row_numbers, goal in rows]


def solution_class(completions: list[Any], **_: Any) -> list[str | None]:
    """The canonical form of each completion; None where it is no expression."""
    return [canonical(_text(completion)) for completion in completions]


def known_classes(numbers: list[Sequence[int]], target: list[int], **_: Any) -> list[int | None]:
    """The number of classes that solve each problem; None where they are too many to enumerate."""
    rows = zip(map(_whole_numbers, numbers), map(int, target), strict=True)
    return [
        len(classes(tuple(sorted(row_numbers))).get(goal, ())) if len(row_numbers) <= MOST_ENUMERATED else None
        for row_numbers, goal in rows
    ]


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
def answers(problem: Problem) -> tuple[str, ...]:
    """Every expression that solves the problem; none when it has no solution."""
    numbers, target = problem.numbers, problem.target
    return tuple(expression for expression in expressions(numbers) if is_solution(expression, numbers, target))


@cache
def classes(numbers: tuple[int, ...]) -> dict[int, frozenset[str]]:
    """Every value that the numbers reach, with the classes of the expressions that reach it."""
    found: dict[int, set[str]] = {}
    for blocks in _partitions(list(numbers)):
        products = [tuple(sorted(block)) for block in blocks]
        for signs in itertools.product((False, True), repeat=len(products)):
            if not all(signs):  # the first term of an expression has no sign
                signed = list(zip(signs, products, strict=True))
                found.setdefault(_total(signed), set()).add(_spelled(signed))
    return {value: frozenset(spellings) for value, spellings in sorted(found.items())}


@cache
def solvable(count: int) -> tuple[Problem, ...]:
    """Every problem of `count` numbers that is posed, in order: three numbers have a solution, four several classes."""
    return tuple(
        Problem(numbers, target)
        for numbers in itertools.combinations_with_replacement(range(1, 10), count)
        for target, found in classes(numbers).items()
        if 0 <= target <= 99 and len(found) >= LEAST_CLASSES[count]
    )


@cache
def problems(count: int, split: str) -> tuple[Problem, ...]:
    """The problems of `train` or `test`: disjoint sets of (sorted numbers, target), in a hashed order."""
    if split not in ("train", "test"):
        raise KeyError(split)
    shuffled = sorted(solvable(count), key=_digest)
    return tuple(shuffled[:HELD_OUT] if split == "test" else shuffled[HELD_OUT:])


def prompt(numbers: Sequence[int], target: int) -> str:
    """The prompt of a problem with its numbers in this order, e.g. `3 5 7=22:`."""
    return f"{' '.join(map(str, numbers))}={target}:"


def rows(count: int, split: str) -> list[dict[str, Any]]:
    """Dataset rows of `train` or `test`: prompt, numbers, target. KeyError on another split."""
    found = []
    for problem in problems(count, split):
        orders = sorted(set(itertools.permutations(problem.numbers)))
        numbers = list(orders[int(_digest(problem), 16) % len(orders)])
        found.append({"prompt": prompt(numbers, problem.target), "numbers": numbers, "target": problem.target})
    return found


def problem_of(row: dict[str, Any]) -> Problem:
    """The problem of a dataset row."""
    return Problem(tuple(sorted(_whole_numbers(row["numbers"]))), int(row["target"]))


def _total(found: Sequence[Term]) -> int:
    return sum(-prod(factors) if minus else prod(factors) for minus, factors in found)


def _spelled(found: Sequence[Term]) -> str:
    """The canonical spelling of these terms, whose factors are sorted."""
    return "".join("+-"[minus] + "*".join(map(str, factors)) for minus, factors in sorted(found)).removeprefix("+")


def _partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """Every way to part the items into blocks."""
    if not items:
        yield []
        return
    for parts in _partitions(items[1:]):
        yield [[items[0]], *parts]
        for place, block in enumerate(parts):
            yield [*parts[:place], [items[0], *block], *parts[place + 1 :]]


def _digest(problem: Problem) -> str:
    return hashlib.blake2b(f"{problem.numbers}{problem.target}".encode(), digest_size=8).hexdigest()


def _whole_numbers(value: Any) -> list[int]:
    """`[3, 5, 7]`, or the numbers in the text `3 5 7`."""
    return [int(number) for number in (re.findall(r"\d+", value) if isinstance(value, str) else value)]


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
