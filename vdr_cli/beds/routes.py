"""Routes: a way through a small graph of one-way streets, e.g. `ab ac bd cd ad:` asks for `abd` or `acd`.

The prompt lists the streets in a random order, then start and goal. An answer names the nodes of a
route in order, start and goal included. The graphs have no cycles, so a route visits no node twice and all
routes are enumerated: 4 to 64 a problem. A walk may also end in a node that has no way to the goal.

The graphs are drawn from hashes of their number, so every machine has the same prompts. The solution class
of an answer is the route.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

HELD_OUT = 256  # problems of the test split
TRAIN = 2048  # problems of the train split
NODES = "abcdefgh"
STREET_SHARE = 0.55  # of the pairs of nodes
MOST_STREETS = 16
FEWEST_ROUTES, MOST_ROUTES = 4, 64

_ROUTE = re.compile(r"[a-z]{2,26}", re.ASCII)


@dataclass(frozen=True, order=True)
class Problem:
    """The identity of a problem: its sorted streets, each from its first node to its second, and its ends."""

    streets: tuple[str, ...]
    start: str
    goal: str


def is_route(text: str, problem: Problem) -> bool:
    """True when the text names nodes from start to goal, each a street from the one before, and none twice."""
    if not _ROUTE.fullmatch(text):
        return False
    streets = {first + second for first, second in itertools.pairwise(text)}
    return (
        text[0] == problem.start
        and text[-1] == problem.goal
        and len(set(text)) == len(text)
        and streets <= set(problem.streets)
    )


def route(text: str) -> str:
    """The text without spaces: the route that it names."""
    return text.replace(" ", "")


def routes(completions: list[Any], streets: list[Any], start: list[str], goal: list[str], **_: Any) -> list[float]:
    """Reward 1 for a route of the problem, else 0. Columns: `streets` (such as `ab ac bd`), `start`, `goal`."""
    rows = zip(completions, streets, start, goal, strict=True)
    return [float(is_route(route(_text(completion)), _problem(*row))) for completion, *row in rows]


def solution_class(completions: list[Any], **_: Any) -> list[str | None]:
    """The route that each completion names; None where it is no list of nodes."""
    found = [route(_text(completion)) for completion in completions]
    return [text if _ROUTE.fullmatch(text) else None for text in found]


def known_classes(streets: list[Any], start: list[str], goal: list[str], **_: Any) -> list[int]:
    """The number of routes of each problem."""
    return [len(answers(_problem(*row))) for row in zip(streets, start, goal, strict=True)]


@cache
def answers(problem: Problem) -> tuple[str, ...]:
    """Every route of the problem, in order."""
    return tuple(sorted(enumerated(problem)))


def enumerated(problem: Problem, walked: str = "") -> Iterator[str]:
    """Every route that begins with `walked`, by depth-first search."""
    walked = walked or problem.start
    if walked[-1] == problem.goal:
        yield walked
        return
    for street in problem.streets:
        if street[0] == walked[-1] and street[1] not in walked:
            yield from enumerated(problem, walked + street[1])


def drawn(number: int) -> Problem:
    """The problem of this number, before any is left out: nodes in a hidden order, and streets that follow it."""
    rng = random.Random(int(_digest(f"routes {number}"), 16))
    order = sorted(NODES, key=lambda _: rng.random())
    streets = [first + second for first, second in itertools.combinations(order, 2) if rng.random() < STREET_SHARE]
    last = len(order) - 1 - int(rng.random() * 3)  # nodes behind the goal are dead ends
    return Problem(tuple(sorted(streets)), order[0], order[last])


def is_posed(problem: Problem) -> bool:
    """True when the problem has as many streets and routes as the bed promises."""
    return len(problem.streets) <= MOST_STREETS and FEWEST_ROUTES <= len(tuple(enumerated(problem))) <= MOST_ROUTES


@cache
def problems(split: str) -> tuple[Problem, ...]:
    """The problems of `train` or `test`: the first that are posed, disjoint."""
    if split not in ("train", "test"):
        raise KeyError(split)
    found: dict[Problem, None] = {}
    for number in itertools.count():
        if is_posed(problem := drawn(number)):
            found[problem] = None
        if len(found) == HELD_OUT + TRAIN:
            break
    ordered = tuple(found)
    return ordered[:HELD_OUT] if split == "test" else ordered[HELD_OUT:]


def prompt(streets: Sequence[str], start: str, goal: str) -> str:
    """The prompt of a problem with its streets in this order, e.g. `ab ac bd cd ad:`."""
    return f"{' '.join(streets)} {start}{goal}:"


def rows(split: str) -> list[dict[str, Any]]:
    """Dataset rows of `train` or `test`: prompt, streets, start, goal. KeyError on another split."""
    found = []
    for problem in problems(split):
        listed = sorted(problem.streets, key=lambda street: _digest(f"{problem.streets}{street}"))
        text = prompt(listed, problem.start, problem.goal)
        found.append({"prompt": text, "streets": " ".join(listed), "start": problem.start, "goal": problem.goal})
    return found


def problem_of(row: dict[str, Any]) -> Problem:
    """The problem of a dataset row."""
    return _problem(row["streets"], row["start"], row["goal"])


def _problem(streets: Any, start: str, goal: str) -> Problem:
    listed = streets.split() if isinstance(streets, str) else streets
    return Problem(tuple(sorted(listed)), start, goal)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
