"""Paired differences: intervals, tests, Holm, equivalence, power."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from vdr_cli.stats.paired import (
    Mean,
    detectable_deviations,
    holm,
    mean_over_seeds,
    mean_over_seeds_and_prompts,
)


def table(seed: float, prompt: float, rest: float, shape: tuple[int, int], generator: np.random.Generator) -> NDArray:
    S, P = shape
    draw = generator.standard_normal
    return seed * draw((S, 1)) + prompt * draw((1, P)) + rest * draw((S, P))


def test_the_interval_of_a_few_numbers_is_students() -> None:
    """Mean 3.75, standard error 1.54785, t(3) at 0.975 3.18245; Student's t test gives p = 0.0939."""
    found = mean_over_seeds(np.array([1.0, 2.0, 4.0, 8.0]))
    assert found.interval() == pytest.approx((-1.17594, 8.67594), abs=1e-4)
    assert found.p_value() == pytest.approx(0.0942, abs=0.001)


def test_variance_components_by_hand() -> None:
    """Rows 1 and 3, columns 0 and 2, no rest: MS of seeds 2 * 2 = 4, of prompts the same, their sum over 4 cells."""
    found = mean_over_seeds_and_prompts(np.array([[0.0, 2.0], [2.0, 4.0]]))
    assert found.value == 2.0 and found.error == pytest.approx(math.sqrt((4 + 4) / 4))


def test_one_prompt_or_no_spread_between_prompts_is_a_test_of_seeds() -> None:
    seeds = np.array([0.1, 0.4, 0.2, 0.7])
    for columns in (1, 50):
        found = mean_over_seeds_and_prompts(np.repeat(seeds[:, None], columns, axis=1))
        assert found.error == pytest.approx(mean_over_seeds(seeds).error)
        assert found.whole_freedom == 3


@pytest.mark.parametrize("spread", [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.3, 0.6, 2.0), (0.05, 0.0, 1.0)])
def test_the_interval_covers_nineteen_times_in_twenty(spread: tuple[float, float, float]) -> None:
    """20 seeds, 64 prompts, 1,500 tables: the share has a standard error of 0.6 %."""
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(1500):
        low, high = mean_over_seeds_and_prompts(table(*spread, (20, 64), generator)).interval()
        covered += low <= 0.0 <= high
    assert 0.93 <= covered / 1500 <= 0.97


def test_ten_arms_that_do_nothing_are_rarely_called_different() -> None:
    """The arms share the control, as in a study. 1,000 studies: a standard error of 0.7 %."""
    generator = np.random.default_rng(2)
    wrong = 0
    for _ in range(1000):
        control = generator.standard_normal(20)
        arms = generator.standard_normal((10, 20))
        wrong += min(holm([mean_over_seeds(arm - control).p_value() for arm in arms])) < 0.05
    assert wrong / 1000 <= 0.05 + 2 * 0.007


def test_the_detectable_difference_is_found_four_times_in_five() -> None:
    generator = np.random.default_rng(3)
    effect = detectable_deviations(20)
    found = [mean_over_seeds(effect + generator.standard_normal(20)).p_value() < 0.05 for _ in range(2000)]
    assert 0.77 <= np.mean(found) <= 0.84
    assert detectable_deviations(1) == math.inf
    assert all(more < less for less, more in pairwise(detectable_deviations(n, 10) for n in range(2, 40)))


def test_p_and_interval_agree() -> None:
    generator = np.random.default_rng(4)
    for _ in range(200):
        found = mean_over_seeds(0.7 + generator.standard_normal(6))
        low, high = found.interval()
        assert (found.p_value() < 0.05) == (not low <= 0.0 <= high)
        low, high = found.interval(0.9)
        assert (found.p_equivalent(0.5) < 0.05) == (low > -0.5 and high < 0.5)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.04, 0.09, 0.09, 1.0])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [0.2, 0.2, 0.2], [0.2]])
def test_without_spread_nothing_is_claimed(values: list[float]) -> None:
    """Equal values, or one seed: nothing says how much others would vary."""
    found = mean_over_seeds_and_prompts(np.repeat(np.array(values)[:, None], 4, axis=1))
    assert all(map(math.isnan, (*found.interval(), found.p_value(), found.p_equivalent(0.1), found.detectable())))


def test_a_mean_beyond_the_bound_is_not_equivalent() -> None:
    assert Mean(0.05, 0.001, 19.0).p_equivalent(0.02) > 0.99
    assert Mean(0.0, 0.001, 19.0).p_equivalent(0.02) < 1e-6
