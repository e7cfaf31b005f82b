"""Demonstrations for pretraining the beds' models: for each bed, the draw of an example in each of its two phases.

No example poses a held-out problem.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from vdr_cli.beds import countdown, routes

Draw = Callable[[random.Random, float], tuple[str, str]]
"""Prompt and completion of an example; right: chance that the completion is right."""


@dataclass(frozen=True)
class Pretraining:
    """The recipe of a bed's model: first it learns right answers, then it comes to doubt them."""

    characters: str
    """The tokens beside padding and end, one a character."""
    learn: Draw
    doubt: Draw
    learn_steps: int
    doubt_steps: int
    right: float
    """Share of right completions at the end of the doubt phase."""
    batch: int = 256
    hidden: int = 128
    layers: int = 3
    learn_lr: float = 2e-3
    doubt_lr: float = 3e-4


# Three numbers: random expressions instead of right ones make the model doubt.


@cache
def outside() -> dict[tuple[tuple[int, ...], int], list[str]]:
    """Problems of three numbers whose target is below 0 or above 99, with their answers: arithmetic, no task."""
    found: dict[tuple[tuple[int, ...], int], list[str]] = {}
    for numbers in itertools.combinations_with_replacement(range(1, 10), 3):
        for expression in countdown.expressions(numbers):
            parsed = countdown.evaluate(expression)
            if parsed is not None and not 0 <= parsed[1] <= 99:
                found.setdefault((numbers, parsed[1]), []).append(expression)
    return found


@cache
def _outside_problems() -> list[tuple[tuple[int, ...], int]]:
    return list(outside())


def guess(rng: random.Random, numbers: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers, or (15 % each) two of them, or one of them twice: so that where to end is a question too."""
    kind = rng.random()
    if kind < 0.15:
        return tuple(sorted(rng.sample(numbers, 2)))
    if kind < 0.30:
        return tuple(sorted((*numbers, rng.choice(numbers))))
    return numbers


def three_numbers(rng: random.Random, right: float) -> tuple[str, str]:
    """A problem with its numbers in a random order; half of the targets lie beyond 0-99."""
    if rng.random() < 0.5:
        numbers, target = rng.choice(_outside_problems())
        answers: Sequence[str] = outside()[numbers, target]
    else:
        problem = rng.choice(countdown.problems(3, "train"))
        numbers, target, answers = problem.numbers, problem.target, countdown.answers(problem)
    if rng.random() < right:
        completion = rng.choice(answers)
    else:
        completion = rng.choice(countdown.expressions(guess(rng, numbers)))
    return countdown.prompt(rng.sample(numbers, 3), target), completion


# Four numbers: the model comes to know an expression's value only roughly, and prefers sums.

ROUGHLY = 20  # largest difference between the target and the value of a wrong expression
WRONG_NUMBERS = 0.6  # share of completions that leave out a number or use one twice
LEARNT_SIGNS = {"+": 1.0, "-": 0.7, "*": 0.7}
DOUBTED_SIGNS = {"+": 1.0, "-": 0.2, "*": 0.02}


def _expression(rng: random.Random, numbers: Sequence[int], signs: dict[str, float]) -> str:
    """The numbers in this order, with signs drawn by weight."""
    gaps = rng.choices(list(signs), list(signs.values()), k=len(numbers) - 1)
    return "".join(f"{number}{gap}" for number, gap in zip(numbers, (*gaps, ""), strict=True))


@cache
def _held_out(count: int) -> frozenset[countdown.Problem]:
    return frozenset(countdown.problems(count, "test"))


def _posed(rng: random.Random, numbers: Sequence[int], target: int) -> str | None:
    """The prompt, with the numbers in another order; None for a held-out problem."""
    if countdown.Problem(tuple(sorted(numbers)), target) in _held_out(len(numbers)):
        return None
    return countdown.prompt(rng.sample(list(numbers), len(numbers)), target)


def four_numbers(rng: random.Random, right: float) -> tuple[str, str]:
    """A random expression and the problem that it solves."""
    while True:
        numbers = [rng.randint(1, 9) for _ in range(4)]
        expression = _expression(rng, numbers, LEARNT_SIGNS)
        value = countdown.evaluate(expression)[1]  # type: ignore[index]
        prompt = _posed(rng, numbers, value)
        if prompt is not None and -99 <= value <= 199:
            return prompt, expression


def four_numbers_roughly(rng: random.Random, right: float) -> tuple[str, str]:
    """A random expression, mostly a sum, and a target near its value; the wrong numbers often."""
    while True:
        numbers = [rng.randint(1, 9) for _ in range(4)]
        expression = _expression(rng, numbers, DOUBTED_SIGNS)
        target = countdown.evaluate(expression)[1]  # type: ignore[index]
        if rng.random() >= right:
            target += rng.choice((-1, 1)) * rng.randint(1, ROUGHLY)
            if rng.random() < WRONG_NUMBERS:
                expression = _expression(rng, _wrong(rng, numbers), DOUBTED_SIGNS)
        prompt = _posed(rng, numbers, target)
        if prompt is not None and 0 <= target <= 99:
            return prompt, expression


def _wrong(rng: random.Random, numbers: list[int]) -> list[int]:
    """One of the numbers left out or there twice, in a random order."""
    count = rng.choice((3, 5))
    return rng.sample([*numbers, rng.choice(numbers)], count) if count == 5 else rng.sample(numbers, count)


# Routes: the model prefers short ones, and comes to make mistakes.

LEARNT_DETOUR = 0.2  # weight of a route over that of a route one node shorter
DOUBTED_DETOUR = 0.05


@cache
def _held_out_routes() -> frozenset[routes.Problem]:
    return frozenset(routes.problems("test"))


def _renamed(rng: random.Random) -> routes.Problem:
    """A problem of the train split with its nodes renamed at random, never a held-out one."""
    while True:
        known = rng.choice(routes.problems("train"))
        names = str.maketrans(routes.NODES, "".join(rng.sample(routes.NODES, len(routes.NODES))))
        streets = tuple(sorted(street.translate(names) for street in known.streets))
        problem = routes.Problem(streets, known.start.translate(names), known.goal.translate(names))
        if problem not in _held_out_routes():
            return problem


def _preferred(rng: random.Random, problem: routes.Problem, detour: float) -> str:
    found = tuple(routes.enumerated(problem))
    return rng.choices(found, [detour ** len(route) for route in found])[0]


def _mistaken(rng: random.Random, route: str) -> str:
    """The route with a node left out, put in or changed; by chance it may still be one."""
    nodes = list(route)
    place = rng.randrange(1, len(nodes))
    removed, added = rng.choice(((1, 0), (0, 1), (1, 1)))
    nodes[place : place + removed] = rng.choices(routes.NODES, k=added)
    return "".join(nodes)


def route(rng: random.Random, right: float) -> tuple[str, str]:
    """A problem with its streets in a random order, and a route, mostly a short one."""
    return _route(rng, 1.0, LEARNT_DETOUR)


def route_with_mistakes(rng: random.Random, right: float) -> tuple[str, str]:
    """The same with one of the shortest routes, or what a mistake made of it."""
    return _route(rng, right, DOUBTED_DETOUR)


def _route(rng: random.Random, right: float, detour: float) -> tuple[str, str]:
    problem = _renamed(rng)
    is_right = rng.random() < right
    completion = _preferred(rng, problem, detour)
    if not is_right:
        completion = _mistaken(rng, completion)
    return routes.prompt(rng.sample(problem.streets, len(problem.streets)), problem.start, problem.goal), completion


PRETRAINING = {
    "starter": Pretraining(
        "0123456789+-*=: ", three_numbers, three_numbers, learn_steps=1000, doubt_steps=200, right=0.5
    ),
    "countdown4": Pretraining(
        "0123456789+-*=: ",
        four_numbers,
        four_numbers_roughly,
        learn_steps=1200,
        doubt_steps=200,
        right=0.01,
        batch=128,
    ),
    "routes": Pretraining(
        routes.NODES + ": ",
        route,
        route_with_mistakes,
        learn_steps=2000,
        doubt_steps=150,
        right=0.25,
        batch=64,
        hidden=96,
    ),
}
