"""Guess: find a hidden number among 15 in four guesses; after each the answer is `higher`, `lower` or `found`.

A game of several turns, small enough to learn in minutes. Halving the range always wins; its model starts by guessing
within the range and mostly forgets what it was told. The class follows the contract of environments that vdr and TRL
share: a tool, and a reward of its own.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache
from typing import Any

WIDTH = 15
"""Numbers of a range."""
LOWEST = range(1, 18)
"""First numbers of a range."""
GUESSES = 4
"""Enough for halving: 2^4 - 1 numbers."""
HELD_OUT = 40
NEARLY = 0.75
"""Reward of a lost game whose answers leave one number; less the more they leave. Winning alone is a matter of luck for
a player who halves now and then, and says little about a guess."""


class Guess:
    """One game."""

    def __init__(self) -> None:
        self.secret, self.low = 1, 1
        self.guesses: list[int] = []

    def reset(self, secret: int = 1, low: int = 1, **_: Any) -> None:
        """Begin a game. secret: the hidden number; low: the first number of its range. Both are columns of the rows."""
        self.secret, self.low, self.guesses = int(secret), int(low), []

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
        """1 when the number was found, else NEARLY times the share of the range's bits that the answers told."""
        return 1.0 if self.is_found else NEARLY * (1 - math.log(self.left) / math.log(WIDTH))

    @property
    def left(self) -> int:
        """The number of candidates that are consistent with the answers so far."""
        first = max((number + 1 for number in self.guesses if number < self.secret), default=self.low)
        last = min((number - 1 for number in self.guesses if number > self.secret), default=self.low + WIDTH - 1)
        return 1 if self.is_found else min(last, self.low + WIDTH - 1) - max(first, self.low) + 1

    @property
    def is_found(self) -> bool:
        """True once a guess was right."""
        return self.secret in self.guesses


def prompt(low: int) -> list[dict[str, str]]:
    """The prompt of a range, as chat messages: `7 to 21`."""
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
