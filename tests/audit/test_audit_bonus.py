"""The bonus against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vdr_cli.audit import bonus

MASK = np.array([[True, True, True, False], [True, True, False, False]])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.2, 0.2, 0.2, 0.2]),
        ("linear", [0.2, 0.15, 0.1, 0.0]),
        ("cosine", [0.2, 0.1 * (1 + math.cos(math.pi / 4)), 0.1, 0.0]),
        ("staircase", [0.2, 0.15, 0.1, 0.0]),
    ],
)
def test_schedules(schedule, expected):
    found = [bonus.weight_at(schedule, 0.2, 0.5, step, 80) for step in (0, 10, 20, 40)]
    assert found == pytest.approx(expected)
    assert bonus.weight_at("staircase", 0.2, 0.5, 19, 80) == pytest.approx(0.15)


def test_reduced_counts_valid_tokens_and_the_last_n_of_them():
    measure = np.array([[1.0, 2.0, 6.0, 50.0], [4.0, 8.0, 50.0, 50.0]])
    assert bonus.reduced(measure, MASK, None).tolist() == [3.0, 6.0]
    assert bonus.reduced(measure, MASK, 1).tolist() == [6.0, 8.0]


def test_credit_is_what_follows():
    measure = np.array([[1.0, 2.0, 6.0, 50.0], [4.0, 8.0, 50.0, 50.0]])
    assert bonus.credit(measure, MASK, "bald", 0.5, None).tolist() == [[5.0, 6.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0]]
    assert bonus.credit(measure, MASK, "rmi", 0.5, None).tolist() == [[3.5, 5.0, 6.0, 0.0], [8.0, 8.0, 0.0, 0.0]]
    assert bonus.credit(measure, MASK, "rmi", 1.0, 1).tolist() == [[6.0, 6.0, 6.0, 0.0], [8.0, 8.0, 0.0, 0.0]]


def test_deviation_is_of_the_group_at_each_position_and_0_without_spread():
    b, mask = np.array([[1.0, 5.0], [3.0, 7.0], [2.0, 2.0], [2.0, 2.0 + 1e-7]]), np.ones((4, 2), dtype=bool)
    mask[1, 1] = False
    assert bonus.deviation(b, mask, 2).tolist() == [[-1, 0], [1, 0], [0, 0], [0, 0]]
    assert bonus.spread(b, mask, 2).tolist() == [True, False]


def test_rms_weighs_steps_by_their_age():
    one = bonus.Rms().after(np.array([[3.0], [-3.0]]), np.ones((2, 1), dtype=bool))
    assert one.value == pytest.approx(3.0)
    two = one.after(np.array([[1.0], [9.0]]), np.array([[True], [False]]))
    assert two.value == pytest.approx(math.sqrt((0.99 * 9 + 1) / 1.99))
    assert bonus.Rms().value == 2**-20


def test_gates():
    task = np.array([1.0, 0.0, 0.5, 0.5])
    assert bonus.open_gate("incorrect", task, 1.0, 2).tolist() == [False, True, True, True]
    assert bonus.open_gate("zero_variance", task, 1.0, 2).tolist() == [False, False, True, True]
    assert bonus.open_gate("not_failed", task, 1.0, 2).tolist() == [True, True, False, False]
    assert bonus.open_gate("not_failed", task, 0.5, 2).all()
    assert bonus.open_gate("all", task, 1.0, 2).all()


def test_multiplicative_and_quality():
    task, rewards, b = np.array([1.0, -1.0]), np.array([1.0, 0.0]), np.array([0.3, 0.1])
    z = 0.1 / (math.sqrt(0.02) + 1e-6)
    high, low = 1 / (1 + math.exp(-z)), 0.5
    found = bonus.shaped("multiplicative", task, rewards, b, np.ones(2, dtype=bool), 2, 0.4, 3.0)
    assert found.tolist() == pytest.approx([1 + 0.4 * high, -(1 + 0.4 * low)])
    s = 1 / (1 + math.exp(-0.5))
    coefficients = np.array([1 + s * 0.4 * high, 1 + (1 - s) * 0.4 * low])
    found = bonus.shaped("quality", task, rewards, b, np.ones(2, dtype=bool), 2, 0.4, 3.0)
    assert found.tolist() == pytest.approx((task * coefficients / coefficients.mean()).tolist())
    closed = bonus.shaped("multiplicative", task, rewards, b, np.zeros(2, dtype=bool), 2, 0.4, 3.0)
    assert closed.tolist() == task.tolist()
