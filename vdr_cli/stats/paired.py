"""Paired differences over seeds and prompts: interval, test, equivalence, Holm's correction, detectable difference.

Every seed is measured on the same prompts, so the differences form a table, seeds by prompts. Both are samples: of the
runs that could have been made and of the problems that could have been asked. The mean of the table has the variance

    sigma_seed^2 / S + sigma_prompt^2 / P + sigma_rest^2 / (S P),

which the mean squares of a two-way table without replication estimate, with Satterthwaite's degrees of freedom
(Searle, Casella, McCulloch 1992, Variance Components, ch. 4; Owen 2007, The pigeonhole bootstrap, for the same variance
by resampling). A percentile bootstrap over a few seeds covers too rarely: it divides by S instead of S - 1 and takes
normal quantiles for Student's. benchmarks/study_statistics.json has the coverage of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vdr_cli.stats.bootstrap import LEVEL, student_cdf, student_quantile

Array = NDArray[np.float64]
POWER = 0.8
"""Probability with which a detectable difference is found."""
ROUNDING = 1e-12
"""Means and errors below this are rounding of equal numbers."""


@dataclass(frozen=True)
class Mean:
    """A mean with its standard error. freedom: degrees of freedom; nan where one seed says nothing of the spread."""

    value: float
    error: float
    freedom: float

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Student's interval; (nan, nan) where nothing is known of the spread."""
        if not self.is_known:
            return math.nan, math.nan
        half = self.error * student_quantile(0.5 + level / 2, self.whole_freedom)
        return self.value - half, self.value + half

    def p_above(self, bound: float) -> float:
        """One-sided p of the hypothesis that the mean is at most `bound`; nan where nothing is known of the spread."""
        if not self.is_known:
            return math.nan
        t = (self.value - bound) / self.error
        below = student_cdf(abs(t), self.whole_freedom)
        return 1.0 - below if t > 0 else below

    def p_value(self) -> float:
        """Two-sided p of the hypothesis that the mean is 0."""
        above = self.p_above(0.0)
        return 2.0 * min(above, 1.0 - above) if self.is_known else math.nan

    def p_equivalent(self, bound: float) -> float:
        """p of the hypothesis that the mean lies outside (-bound, bound): two one-sided tests (Schuirmann 1987)."""
        return max(self.p_above(-bound), 1.0 - self.p_above(bound)) if self.is_known else math.nan

    def detectable(self) -> float:
        """The difference that a two-sided test finds at POWER, given this standard error."""
        return self.error * detectable_errors(self.whole_freedom) if self.is_known else math.nan

    @property
    def is_known(self) -> bool:
        """False for one seed, and where all values are equal: nothing says how much others would vary."""
        return math.isfinite(self.freedom) and self.error > 0

    @property
    def whole_freedom(self) -> int:
        """Rounded down, which errs on the safe side."""
        return max(int(self.freedom), 1)


def mean_over_seeds(values: Array) -> Mean:
    """The mean of one number per seed, (S,)."""
    if len(values) < 2:
        return Mean(float(values.mean()) if len(values) else math.nan, math.nan, math.nan)
    return _mean(float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))), len(values) - 1.0)


def mean_over_seeds_and_prompts(values: Array) -> Mean:
    """The mean of a table (S, P), over the seeds and the prompts that could have been drawn."""
    S, P = values.shape
    if S < 2 or P < 2:
        return mean_over_seeds(values.mean(1) if P else np.full(S, np.nan))
    total = float(values.mean())
    rows, columns = values.mean(1), values.mean(0)
    rest = values - rows[:, None] - columns[None, :] + total
    seeds = P * float(((rows - total) ** 2).sum()) / (S - 1)
    prompts = S * float(((columns - total) ** 2).sum()) / (P - 1)
    noise = float((rest**2).sum()) / ((S - 1) * (P - 1))
    square = max(seeds + prompts - noise, seeds)  # never less than what the seeds alone say
    if square < ROUNDING**2:
        return _mean(total, 0.0, S - 1.0)
    spread = seeds**2 / (S - 1) + prompts**2 / (P - 1) + noise**2 / ((S - 1) * (P - 1))
    freedom = max(square**2 / spread, min(S, P) - 1.0)
    return _mean(total, math.sqrt(square / (S * P)), freedom)


def _mean(value: float, error: float, freedom: float) -> Mean:
    return Mean(value if abs(value) > ROUNDING else 0.0, error if error > ROUNDING else 0.0, freedom)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p (1979), in the given order: below alpha for a wrong one with probability alpha at most.

    A p that is nan counts as 1.
    """
    known = [1.0 if math.isnan(p) else p for p in p_values]
    adjusted, least = [0.0] * len(known), 0.0
    for rank, index in enumerate(sorted(range(len(known)), key=lambda index: known[index])):
        least = max(least, min(1.0, (len(known) - rank) * known[index]))
        adjusted[index] = least
    return adjusted


def detectable_errors(freedom: int, alpha: float = 1.0 - LEVEL) -> float:
    """The difference, in standard errors, that a two-sided t test at `alpha` finds at POWER (approximate)."""
    return student_quantile(1.0 - alpha / 2, freedom) + student_quantile(POWER, freedom)


def detectable_deviations(seeds: int, comparisons: int = 1) -> float:
    """The same in standard deviations of a seed's paired difference, when Holm's first step allows alpha / comparisons.

    inf for one seed, which has no interval.
    """
    if seeds < 2:
        return math.inf
    return detectable_errors(seeds - 1, (1.0 - LEVEL) / max(comparisons, 1)) / math.sqrt(seeds)
