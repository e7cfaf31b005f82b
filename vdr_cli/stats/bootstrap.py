"""Percentile bootstrap over clusters (prompts, groups)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
LEVEL = 0.95
_CELLS = 4_000_000  # counts held at once


def resampled_counts(clusters: int, resamples: int, seed: int, width: int | None = None) -> Iterator[NDArray[np.int64]]:
    """How often each cluster is drawn in each resample, in blocks of (R, clusters); the same for the same seed.

    width: numbers that the caller holds for each resample; blocks are the smaller for it.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    share = np.full(clusters, 1.0 / clusters)
    block = max(_CELLS // max(clusters, width or 0, 1), 1)
    for start in range(0, resamples, block):
        yield generator.multinomial(clusters, share, size=min(block, resamples - start))


def resampled_ratios(
    sums: NDArray[np.float64], counts: NDArray[np.float64], seed: int = 0, resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """(R, K) of K ratios, each of two totals over resampled clusters; sums and counts (N, K). NaN where nothing counts.

    One cluster says nothing of its spread: all NaN.

    The same clusters are drawn for the same seed and N: differences between two calls are paired.
    """
    drawn = [(times @ sums, times @ counts) for times in resampled_counts(len(sums), resamples, seed)]
    totals, weights = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    ratios: NDArray[np.float64] = np.full(totals.shape, np.nan)
    np.divide(totals, weights, out=ratios, where=(weights > 0) & (len(sums) > 1))
    return ratios


def interval(draws: ArrayLike, level: float = LEVEL) -> tuple[float, float]:
    """The central `level` of the draws that are numbers; (nan, nan) without any."""
    tail = (1.0 - level) / 2.0
    finite = np.asarray(draws, np.float64)
    finite = finite[np.isfinite(finite)]
    if finite.size == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [tail, 1.0 - tail])
    return float(low), float(high)
