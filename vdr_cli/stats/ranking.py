"""Quality of an uncertainty's ranking of errors: AUROC, AUPRC, risk-coverage, prediction rejection ratio, calibration.

u is an uncertainty (higher = less certain), e in {0, 1} an error (or any loss where higher is worse). Rows may carry
integer weights, the counts of a bootstrap resample. Rows of equal uncertainty are taken in random order, in
expectation: no result depends on how ties happen to be sorted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vdr_cli.stats.bootstrap import interval, resampled_counts

Array = NDArray[np.float64]
SMALL = 20_000  # rows up to which 1000 resamples take seconds


@dataclass(frozen=True)
class Ranked:
    """Rows sorted by uncertainty, most certain first, in blocks of equal uncertainty."""

    order: NDArray[np.int64]  # (N,)
    starts: NDArray[np.int64]  # (blocks,) first row of each block
    loss: Array  # (N,) in that order

    @classmethod
    def of(cls, uncertainty: Array, loss: Array) -> Ranked:
        order = np.argsort(uncertainty, kind="stable")
        ranked = uncertainty[order]
        starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
        return cls(order, starts, loss[order])

    def blocks(self, weights: Array | None = None) -> tuple[Array, Array]:
        """(rows, loss) of each block, (..., blocks); weights: (..., N) in the original order."""
        own = np.ones(len(self.order)) if weights is None else weights[..., self.order]
        return np.add.reduceat(own, self.starts, axis=-1), np.add.reduceat(own * self.loss, self.starts, axis=-1)


def auroc(ranked: Ranked, weights: Array | None = None) -> Array:
    """P(u of an error > u of a right one) + ½ P(equal); NaN when all rows are right or all wrong. loss in {0, 1}."""
    rows, errors = ranked.blocks(weights)
    right = rows - errors
    below = np.cumsum(right, -1) - right
    return _ratio((errors * (below + right / 2)).sum(-1), errors.sum(-1) * right.sum(-1))


def auprc(ranked: Ranked, weights: Array | None = None) -> Array:
    """Average precision of finding errors by descending uncertainty: Σ (R_i − R_{i−1}) P_i over distinct values."""
    rows, errors = (values[..., ::-1] for values in ranked.blocks(weights))
    precision = _ratio(np.cumsum(errors, -1), np.cumsum(rows, -1), otherwise=0.0)
    return _ratio((errors * precision).sum(-1), errors.sum(-1))


def risk_coverage(ranked: Ranked) -> tuple[Array, Array]:
    """(coverage, risk): mean loss of the most certain rows that make up each share, one point a row."""
    rows, losses = ranked.blocks()
    ends = np.concatenate([[0.0], np.cumsum(rows)])
    at = np.arange(1, len(ranked.order) + 1)
    total = np.interp(at, ends, np.concatenate([[0.0], np.cumsum(losses)]))  # inside a block: expectation over orders
    return at / max(len(at), 1), total / at


def aurc(ranked: Ranked, weights: Array | None = None) -> Array:
    """Area under the risk-coverage curve: the mean of its points (Geifman & El-Yaniv 2017). Lower is better.

    Over a block of m rows with loss l, behind n rows with loss L: Σ_{j=1..m} (L + l j/m)/(n + j)
    = l + (L − l n/m)(H(n+m) − H(n)) with the harmonic numbers H. Weights are whole numbers.
    """
    rows, losses = ranked.blocks(weights)
    behind = np.cumsum(rows, -1)
    before, loss_before = behind - rows, np.cumsum(losses, -1) - losses
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, behind.max(initial=0) + 1))])
    steps = harmonic[behind.astype(np.int64)] - harmonic[before.astype(np.int64)]
    slope = _ratio(losses, rows, otherwise=0.0)
    return _ratio((losses + (loss_before - slope * before) * steps).sum(-1), rows.sum(-1))


def prr(ranked: Ranked, weights: Array | None = None) -> Array:
    """Prediction rejection ratio: (AURC of chance − AURC) / (AURC of chance − AURC of the oracle).

    Malinin & Gales 2021, arXiv 2002.07650, app. B. 1 is the oracle's order, 0 chance, negative worse than chance.
    """
    own = np.ones(len(ranked.order)) if weights is None else weights[..., ranked.order]
    chance = _ratio((own * ranked.loss).sum(-1), own.sum(-1))
    oracle = aurc(Ranked.of(ranked.loss, ranked.loss), own)
    return _ratio(chance - aurc(ranked, weights), chance - oracle)


def _ratio(top: Array, bottom: Array, otherwise: float = np.nan) -> Array:
    """top / bottom where bottom is above rounding, else `otherwise`."""
    top, bottom = np.asarray(top), np.asarray(bottom)
    ratio: Array = np.full(top.shape, otherwise)
    np.divide(top, bottom, out=ratio, where=bottom > 1e-12)
    return ratio


def expected_calibration_error(confidence: Array, right: Array, bins: int = 10) -> float:
    """Σ_b (n_b/N) |accuracy_b − confidence_b| over equal-width bins (Naeini et al. 2015)."""
    index = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    counts = np.bincount(index, minlength=bins)
    gap = np.bincount(index, right - confidence, minlength=bins)
    return float(np.abs(gap).sum() / max(counts.sum(), 1))


BINARY: dict[str, Callable[[Ranked, Array | None], Array]] = {"auroc": auroc, "auprc": auprc}
ANY: dict[str, Callable[[Ranked, Array | None], Array]] = {"prr": prr, "aurc": aurc}


def with_intervals(
    uncertainty: Array, loss: Array, clusters: NDArray[np.int64], resamples: int | None = None
) -> dict[str, float]:
    """Every measure with its 95 % bootstrap interval over clusters; AUROC and AUPRC where the loss is 0 or 1.

    Rows with NaN are left out. One cluster says nothing of its spread: its intervals are NaN. clusters: (N,) any
    integers. resamples: None: 1000, fewer for very many rows.
    """
    kept = np.isfinite(uncertainty) & np.isfinite(loss)
    ranked = Ranked.of(uncertainty[kept], loss[kept])
    is_binary = bool(np.isin(loss[kept], (0.0, 1.0)).all())
    measures = {**(BINARY if is_binary else {}), **ANY}
    result: dict[str, float] = {}
    if not kept.any():
        return {key: float("nan") for name in measures for key in (name, f"{name}_low", f"{name}_high")}
    names, member = np.unique(clusters[kept], return_inverse=True)
    draws: dict[str, list[Array]] = {name: [] for name in measures}
    count = resamples or (1000 if ranked.order.size <= SMALL else 100)
    for counts in resampled_counts(len(names), count, seed=0, width=ranked.order.size):
        weights = counts[:, member].astype(np.float64)  # (R, N)
        for name, function in measures.items():
            draws[name].append(function(ranked, weights))
    for name, function in measures.items():
        low, high = interval(np.concatenate(draws[name]), len(names))
        result |= {name: float(function(ranked, None)), f"{name}_low": low, f"{name}_high": high}
    return result
