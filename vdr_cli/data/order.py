"""The order in which prompts are drawn: a pure function of the seed, the same on every rank."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> tuple[int, ...]:
    """The rows 0..n-1 in the order of one pass: a permutation keyed by (seed, epoch), or as they lie."""
    if not shuffle:
        return tuple(range(n))
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)  # a plain list would pass through float64
    generator = np.random.Generator(np.random.Philox(key=key))
    return tuple(int(row) for row in generator.permutation(n))


def stream_indices(n: int, first: int, count: int, seed: int, shuffle: bool) -> list[int]:
    """Rows at positions first..first+count-1 of the endless stream of passes over n rows.

    Position p belongs to pass p // n, so no row returns before its pass has ended.
    """
    return [epoch_order(n, seed, position // n, shuffle)[position % n] for position in range(first, first + count)]
