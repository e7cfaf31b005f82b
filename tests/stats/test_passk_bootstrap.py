import itertools
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from scipy.stats import t as student_t

from vdr_cli.stats.bootstrap import interval, resampled_counts, resampled_ratios, student_quantile
from vdr_cli.stats.passk import pass_at_k


@settings(deadline=None)
@given(st.integers(1, 60), st.data())
def test_pass_at_k_equals_the_closed_form(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    assert pass_at_k(n, c, k) == pytest.approx(1 - comb(n - c, k) / comb(n, k), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_solution(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert float(pass_at_k(n, c, k)) == pytest.approx(sum(any(s) for s in subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_is_elementwise_and_does_not_overflow() -> None:
    assert pass_at_k([4, 4, 8], [0, 4, 1], 2).tolist() == pytest.approx([0.0, 1.0, 0.25])
    assert float(pass_at_k(100_000, 1, 50_000)) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_the_impossible(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=r"pass@|solved"):
        pass_at_k(n, c, k)


def test_intervals_are_close_to_the_normal_ones() -> None:
    generator = np.random.default_rng(0)
    values, weights = generator.normal(3.0, 2.0, 4000), generator.integers(1, 9, 4000).astype(float)
    sums, counts = np.stack([values, values * weights], 1), np.stack([np.ones(4000), weights], 1)
    draws = resampled_ratios(sums, counts)
    ratio = (values * weights).sum() / weights.sum()
    errors = [values.std() / np.sqrt(4000), (weights * (values - ratio)).std() / weights.mean() / np.sqrt(4000)]
    for column, middle, error in zip(draws.T, (values.mean(), ratio), errors, strict=True):
        half = norm.ppf(0.975) * error
        assert interval(column) == pytest.approx((middle - half, middle + half), abs=0.006)


def test_ratios_are_seeded_paired_and_leave_out_what_does_not_count() -> None:
    values = np.arange(20.0)[:, None]
    ones = np.ones_like(values)
    assert (resampled_ratios(values, ones, 1) == resampled_ratios(values, ones, 1)).all()
    assert (resampled_ratios(values, ones, 1) != resampled_ratios(values, ones, 2)).any()
    assert np.allclose(resampled_ratios(values + 3, ones, 1) - resampled_ratios(values, ones, 1), 3)
    assert np.isnan(resampled_ratios(values * 0, ones * 0)).all()
    assert np.isnan(resampled_ratios(values[:1], ones[:1])).all(), "one cluster says nothing of its spread"


def test_counts_sum_to_the_clusters_in_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(resampled_counts(7, 50, seed=3)))
    assert (whole.sum(1) == 7).all()
    monkeypatch.setattr("vdr_cli.stats.bootstrap._CELLS", 21)
    assert (np.concatenate(list(resampled_counts(7, 50, seed=3))) == whole).all()


def test_interval_of_a_uniform() -> None:
    assert interval(np.linspace(0, 1, 1001)) == pytest.approx((0.025, 0.975))


@pytest.mark.parametrize("freedom", [1, 2, 3, 9, 10, 200])
def test_student_quantiles_are_scipys(freedom: int) -> None:
    for probability in (0.6, 0.975, 0.995):
        assert student_quantile(probability, freedom) == pytest.approx(student_t.ppf(probability, freedom), rel=1e-10)
    assert student_quantile(0.975, 1001) == pytest.approx(student_t.ppf(0.975, 1001), rel=3e-3)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("prompts", [5, 10, 30])
def test_a_95_per_cent_interval_covers_the_truth_in_95_per_cent(prompts: int, paired: bool) -> None:
    """Evaluations of pass@1 with 8 completions of prompts of every difficulty; the truth is 1/2, of a difference 0."""
    generator = np.random.default_rng(prompts)

    def solved() -> np.ndarray:
        return generator.binomial(8, generator.uniform(size=prompts)) / 8

    ones, covered, runs = np.ones((prompts, 1)), {"few": 0, "many": 0}, 1000
    for seed in range(runs):
        values = solved() - solved() if paired else solved()
        draws = resampled_ratios(values[:, None], ones, seed, 1000)[:, 0]
        for name, clusters in (("few", prompts), ("many", None)):
            low, high = interval(draws, clusters)
            covered[name] += low <= (0.0 if paired else 0.5) <= high
    assert covered["few"] / runs == pytest.approx(0.95, abs=0.045 if prompts == 5 else 0.02)
    assert covered["many"] < covered["few"]


def test_few_clusters_widen_an_interval_and_never_past_the_data() -> None:
    draws = np.linspace(0, 1, 2001)
    widths = [np.subtract(*interval(draws, clusters)[::-1]) for clusters in (2, 5, 10, 100, 100_000)]
    assert widths == sorted(widths, reverse=True) and widths[0] <= 1.0
    assert widths[-1] == pytest.approx(0.95, abs=1e-4)
    assert np.isnan(interval(draws, 1)).all()
