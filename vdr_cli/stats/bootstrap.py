"""Percentile bootstrap over clusters (prompts, groups)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
LEVEL = 0.95
_CELLS = 4_000_000  # counts held at once


def resampled_counts(clusters: int, resamples: int, seed: int, width: int | None = None) -> Iterator[NDArray[np.int64]]:
    """Counts of each cluster in each resample, in blocks of (R, clusters); the same for the same seed.

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


def interval(draws: ArrayLike, clusters: int | None = None) -> tuple[float, float]:
    """The central 95 % of the draws that are numbers, widened for few clusters; (nan, nan) without any draws.

    clusters: how many were resampled; None: so many that nothing is widened. The percentile interval of n clusters is
    too narrow twice over: the bootstrap divides by n instead of n - 1, and takes normal quantiles for Student's. The
    expanded percentile interval (Hesterberg 2015, section 5.3.3) takes the draws' quantile at
    Phi(-sqrt(n / (n - 1)) t(n - 1)). It stays within what a mean of the data can be.
    """
    finite = np.asarray(draws, np.float64)
    finite = finite[np.isfinite(finite)]
    if finite.size == 0 or clusters == 1:
        return float("nan"), float("nan")
    tail = (1.0 - LEVEL) / 2.0
    if clusters is not None:
        tail = NormalDist().cdf(-math.sqrt(clusters / (clusters - 1)) * student_quantile(1.0 - tail, clusters - 1))
    low, high = np.quantile(finite, [tail, 1.0 - tail])
    return float(low), float(high)


@cache
def student_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t distribution with a whole number of degrees of freedom; probability in [0.5, 1)."""
    if freedom > 1000:  # within 0.3 % of the normal one
        return NormalDist().inv_cdf(probability)
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def student_cdf(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0: the finite sums of Abramowitz & Stegun 26.7.3 (odd) and 26.7.4 (even)."""
    angle = math.atan2(t, math.sqrt(freedom))
    cosine, total, term = math.cos(angle), 0.0, 1.0 if freedom % 2 == 0 else math.cos(angle)
    for k in range(freedom % 2, freedom - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * cosine * cosine
    inside = math.sin(angle) * total if freedom % 2 == 0 else 2 / math.pi * (angle + math.sin(angle) * total)
    return 0.5 + inside / 2
