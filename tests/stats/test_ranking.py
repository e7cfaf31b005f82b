import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from vdr_cli.stats.ranking import (
    Ranked,
    auprc,
    aurc,
    auroc,
    expected_calibration_error,
    prr,
    risk_coverage,
    with_intervals,
)

ROWS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1), st.integers(0, 3)), min_size=2, max_size=25)


def arrays(rows: list[tuple[int, int, int]]) -> tuple[np.ndarray, ...]:
    return tuple(np.array(column, np.float64) for column in zip(*rows, strict=True))


@settings(deadline=None)
@given(ROWS)
def test_auroc_and_auprc_equal_scikit_learn_with_ties_and_weights(rows: list[tuple[int, int, int]]) -> None:
    u, e, w = arrays(rows)
    assume(0 < (e * w).sum() < w.sum())
    ranked = Ranked.of(u, e)
    assert auroc(ranked, w) == pytest.approx(roc_auc_score(e, u, sample_weight=w))
    assert auprc(ranked, w) == pytest.approx(average_precision_score(e, u, sample_weight=w))
    assume(0 < e.sum() < e.size)
    assert auroc(ranked) == pytest.approx(roc_auc_score(e, u))
    assert auprc(ranked) == pytest.approx(average_precision_score(e, u))


@settings(deadline=None)
@given(ROWS)
def test_weights_are_repetitions(rows: list[tuple[int, int, int]]) -> None:
    u, e, w = arrays(rows)
    assume(w.sum() > 0)
    counts = w.astype(int)
    repeated = Ranked.of(np.repeat(u, counts), np.repeat(e, counts))
    for measure in (aurc, prr):
        assert measure(Ranked.of(u, e), w) == pytest.approx(measure(repeated), nan_ok=True)


def test_risk_coverage_is_the_mean_over_the_orders_of_ties() -> None:
    u, e = np.array([0.0, 1.0, 1.0, 1.0]), np.array([0.0, 1.0, 0.0, 1.0])
    orders = [np.concatenate([[0], np.array(p) + 1]) for p in itertools.permutations(range(3))]
    risks = np.mean([np.cumsum(e[order]) / np.arange(1, 5) for order in orders], axis=0)
    coverage, risk = risk_coverage(Ranked.of(u, e))
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk == pytest.approx(risks)
    assert aurc(Ranked.of(u, e)) == pytest.approx(risk.mean())


def test_prr_on_worked_examples() -> None:
    e = np.array([0.0, 0.0, 1.0, 1.0])
    assert prr(Ranked.of(np.array([1.0, 2.0, 3.0, 4.0]), e)) == pytest.approx(1.0)
    assert prr(Ranked.of(np.zeros(4), e)) == pytest.approx(0.0)
    # certain about one error: risks 1, 1/2, 1/3, 1/2, mean 7/12; oracle 0, 0, 1/3, 1/2, mean 5/24; chance 1/2
    assert prr(Ranked.of(np.array([2.0, 3.0, 1.0, 4.0]), e)) == pytest.approx((1 / 2 - 7 / 12) / (1 / 2 - 5 / 24))
    assert math.isnan(float(prr(Ranked.of(np.arange(3.0), np.zeros(3)))))


def test_prr_equals_the_rejection_curves_of_its_definition() -> None:
    """Rejecting the most uncertain first: area between the curve and chance, over the oracle's (quality = −loss)."""
    generator = np.random.default_rng(0)
    u, loss = generator.normal(size=50), generator.uniform(size=50)

    def area(order: np.ndarray) -> float:
        return float(np.mean(np.cumsum(-loss[order]) / np.arange(1, 51)))

    chance, oracle = float((-loss).mean()), area(np.argsort(loss))
    assert prr(Ranked.of(u, loss)) == pytest.approx((area(np.argsort(u)) - chance) / (oracle - chance))


def test_calibration_error() -> None:
    assert expected_calibration_error(np.array([0.9, 0.9]), np.array([1.0, 1.0])) == pytest.approx(0.1)
    assert expected_calibration_error(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0.0
    two_bins = expected_calibration_error(np.array([0.25, 0.25, 0.75]), np.array([1.0, 0.0, 1.0]), bins=2)
    assert two_bins == pytest.approx((abs(1 - 0.5) + abs(1 - 0.75)) / 3)


def test_intervals_cover_and_are_wider_when_rows_come_in_groups() -> None:
    generator = np.random.default_rng(1)
    group = np.repeat(np.arange(40), 10)
    offset = generator.normal(size=40)[group]
    e = (offset + generator.normal(size=400) > 0).astype(np.float64)
    u = offset + generator.normal(size=400)
    clustered = with_intervals(u, e, group, resamples=300)
    naive = with_intervals(u, e, np.arange(400), resamples=300)
    assert clustered["auroc"] == pytest.approx(roc_auc_score(e, u))
    assert clustered["auroc_low"] < clustered["auroc"] < clustered["auroc_high"]
    width, naive_width = (r["auroc_high"] - r["auroc_low"] for r in (clustered, naive))
    assert width > 1.2 * naive_width
    assert with_intervals(u, e, group, resamples=300) == clustered


def test_quality_has_no_auroc_and_nan_rows_are_left_out() -> None:
    u, loss = np.array([1.0, 2.0, np.nan, 3.0]), np.array([0.1, 0.5, 0.2, 0.9])
    result = with_intervals(u, loss, np.arange(4), resamples=20)
    assert "auroc" not in result
    assert result["prr"] == pytest.approx(1.0)
    assert all(math.isnan(value) for value in with_intervals(u * np.nan, loss, np.arange(4)).values())
