"""Rewards and advantages against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vdr_cli.audit import rewards

NAN = np.nan


def test_combined_skips_none_and_is_none_where_all_are():
    given = np.array([[1.0, 2.0], [NAN, 2.0], [NAN, NAN]])
    assert rewards.combined(given, np.array([0.5, -1.0])).tolist() == pytest.approx([-1.5, -2.0, NAN], nan_ok=True)


def test_overlong_penalty():
    assert rewards.overlong_penalty(np.array([5.0, 6.0, 8.0, 10.0, 12.0]), 10, 4).tolist() == [0, 0, -0.5, -1, -1]
    assert rewards.overlong_penalty(np.array([9.0]), 10, 0).tolist() == [0]


def test_group_advantages_by_scale():
    values = np.array([0.0, 2.0, 4.0, NAN, 3.0, 3.0, 3.0, 3.0])  # ddof 1: 2 and 0
    by_group = rewards.advantages(values, 4, "group")
    assert by_group.tolist() == pytest.approx([-2 / 2.0001, 0, 2 / 2.0001, 0, 0, 0, 0, 0])
    assert rewards.advantages(values, 4, "none").tolist() == [-2, 0, 2, 0, 0, 0, 0, 0]
    std = np.std([0.0, 2, 4, 3, 3, 3, 3], ddof=1)
    assert rewards.advantages(values, 4, "batch")[0] == pytest.approx(-2 / (std + 1e-4))


def test_stalled_groups():
    values = np.array([1.0, 1, 1, NAN, NAN, 2, NAN, NAN, 0, 1, 0, 0])
    assert rewards.stalled(values, 4).tolist() == [True, True, False]


def test_summed_advantages_scale_each_function_first():
    columns = np.array([[0.0, 0.0], [1.0, 100.0], [0.0, 200.0], [1.0, 300.0]])
    std = [np.sqrt(1 / 3), np.std([0.0, 100, 200, 300], ddof=1)]
    score = (columns[:, 0] - 0.5) / (std[0] + 1e-4) + 2 * (columns[:, 1] - 150) / (std[1] + 1e-4)
    expected = (score - score.mean()) / (score.std(ddof=1) + 1e-4)
    weights = np.array([1.0, 2.0])
    assert rewards.summed_advantages(columns, weights, np.zeros(4), 4).tolist() == pytest.approx(expected.tolist())
    added = np.array([0.0, 0.0, 0.0, -0.4])
    score += added + 0.1
    expected = (score - score.mean()) / (score.std(ddof=1) + 1e-4)
    assert rewards.summed_advantages(columns, weights, added, 4).tolist() == pytest.approx(expected.tolist())


def test_solved_up_to_rounding():
    sums = np.array([0.7 + 0.2 + 0.1, 0.6 + 0.3 + 0.1, 0.9999, NAN, 2.0])
    assert sums[0] < 1 and rewards.solved(sums, 1.0).tolist() == [True, True, False, False, True]
