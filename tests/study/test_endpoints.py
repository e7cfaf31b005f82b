"""The numbers that a study compares, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vdr_cli.errors import ConfigError
from vdr_cli.stats.passk import pass_at_k
from vdr_cli.study.endpoints import (
    Measured,
    area_under_pass,
    check_endpoint,
    first_success,
    ks_up_to,
    pass_at,
    value_of,
)


def measured(solved: list[int], samples: int = 4, first: float = 3.0) -> Measured:
    return Measured(samples, np.array(solved), np.array([2, 0, 1]), np.array([0.5, 0.0, 1.0]), first)


def test_each_number_by_hand() -> None:
    run, start = measured([1, 0, 4]), measured([0, 0, 2])
    assert value_of("pass@1", run, start) == pytest.approx([0.25, 0.0, 1.0])
    assert value_of("pass@4", run, start) == pytest.approx([1.0, 0.0, 1.0])
    assert np.mean(value_of("new_problems", run, start)) == 1.0  # the first one
    assert math.isnan(float(value_of("new_problems", run, None)))
    assert value_of("classes", run, start) == pytest.approx([2, 0, 1])
    assert value_of("reward", run, start) == pytest.approx([0.5, 0.0, 1.0])
    assert value_of("first_success", run, start) == 3.0


def test_the_area_by_hand() -> None:
    """pass@1, @2, @4 of one in four: 1/4, 1/2, 1. Trapezoids over log2 k: (3/8 + 6/8) / 2."""
    assert area_under_pass(4, np.array([1, 0, 4])) == pytest.approx([0.5625, 0.0, 1.0])
    assert area_under_pass(1, np.array([1, 0])) == pytest.approx([1.0, 0.0])
    assert ks_up_to(1000) == [1, 2, 4, 8, 16, 32, 64, 128, 256] and ks_up_to(6) == [1, 2, 4, 6]


def test_pass_at_k_from_a_table_is_pass_at_k() -> None:
    solved = np.random.default_rng(0).integers(0, 33, (5, 7))
    for k in (1, 5, 32):
        assert (pass_at(32, solved, k) == pass_at_k(32, solved, k)).all()


def test_the_first_success_is_the_first_step_with_one() -> None:
    steps = [{"step": 0, "eval/pass@1": 1.0}, {"step": 1, "solved": 0.0, "reward": 0.5}, {"step": 2, "solved": 0.1}]
    assert first_success(steps) == 2
    assert first_success(steps[:2]) == 1  # none: all its steps
    assert math.isnan(first_success(steps[:1]))


@pytest.mark.parametrize("name", ["pass@0", "pass@", "pass@-1", "auc", "pass@5"])
def test_what_nothing_computes_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        check_endpoint(name, 4, "endpoint")
