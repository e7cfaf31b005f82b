"""Guess: find a hidden number among 31 in five guesses; after each the answer is `higher`, `lower` or `found`.

A game of several turns, small enough to learn in minutes. Halving the range always wins; its model starts by guessing
within the range and mostly forgets what it was told. The class follows the contract of environments that vdr and TRL
share: a tool, and a reward of its own.
"""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

WIDTH = 31
"""Numbers of a range."""
LOWEST = range(1, 12)
"""First numbers of a range."""
GUESSES = 5
"""Enough for halving: 2^5 - 1 numbers."""
HELD_OUT = 64


class Guess:
    """One game."""

    def __init__(self) -> None:
        self.secret = 0
        self.guesses: list[int] = []

    def reset(self, secret: int = 1, **_: Any) -> None:
        """Begin a game. secret: the hidden number, a column of the rows."""
        self.secret, self.guesses = int(secret), []

    def guess(self, number: int) -> str:
        """Guess the hidden number.

        Args:
            number: The guess.

        Returns:
            higher or lower, for where the hidden number is; found; or over, after the last guess.
        """
        if self.is_found or len(self.guesses) == GUESSES:
            return "over"
        self.guesses.append(number)
        if self.is_found:
            return "found"
        if len(self.guesses) == GUESSES:
            return "over"
        return "higher" if number < self.secret else "lower"

    def get_reward(self) -> float:
        """1 when the number was found, else 0."""
        return float(self.is_found)

    @property
    def is_found(self) -> bool:
        """True once a guess was right."""
        return self.secret in self.guesses


def prompt(low: int) -> list[dict[str, str]]:
    """The prompt of a range, as chat messages: `7 to 37`."""
    return [{"role": "user", "content": f"{low} to {low + WIDTH - 1}"}]


@cache
def problems(split: str) -> tuple[tuple[int, int], ...]:
    """(first number of the range, hidden number) of `train` or `test`, disjoint, in a hashed order. KeyError else."""
    if split not in ("train", "test"):
        raise KeyError(split)
    every = [(low, secret) for low in LOWEST for secret in range(low, low + WIDTH)]
    shuffled = sorted(every, key=lambda problem: hashlib.blake2b(repr(problem).encode(), digest_size=8).digest())
    return tuple(shuffled[:HELD_OUT] if split == "test" else shuffled[HELD_OUT:])


def rows(split: str) -> list[dict[str, Any]]:
    """Dataset rows of `train` or `test`: prompt, low, secret. KeyError on another split."""
    return [{"prompt": prompt(low), "low": low, "secret": secret} for low, secret in problems(split)]
