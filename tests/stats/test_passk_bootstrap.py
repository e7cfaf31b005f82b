import itertools
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from vdr_cli.stats.bootstrap import interval, mean_interval, resampled_counts
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


def test_mean_interval_is_close_to_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 4000)
    low, high = mean_interval(values)
    half = norm.ppf(0.975) * values.std(ddof=1) / np.sqrt(values.size)
    assert low == pytest.approx(values.mean() - half, abs=0.005)
    assert high == pytest.approx(values.mean() + half, abs=0.005)


def test_intervals_are_seeded_and_leave_out_nan() -> None:
    values = np.arange(20.0)
    assert mean_interval(values, seed=1) == mean_interval([*values, np.nan], seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)
    assert all(np.isnan(mean_interval([np.nan])))


def test_counts_sum_to_the_clusters_in_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(resampled_counts(7, 50, seed=3)))
    assert (whole.sum(1) == 7).all()
    monkeypatch.setattr("vdr_cli.stats.bootstrap._CELLS", 21)
    assert (np.concatenate(list(resampled_counts(7, 50, seed=3))) == whole).all()


def test_interval_of_a_uniform() -> None:
    assert interval(np.linspace(0, 1, 1001)) == pytest.approx((0.025, 0.975))
