"""Verdicts: what is within a bound, and what is not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vdr_cli.audit.lines import BOUNDS, Judge, Line

JUDGE = Judge(3, "float32")


def test_each_element_is_within_its_own_bound():
    bound = BOUNDS["float32"]["loss"]
    near = 100.0 * (1 + bound.relative / 2)
    assert JUDGE.compare("x", [100.0, 0.0], [near, bound.absolute / 2], "loss").within
    line = JUDGE.compare("x", [100.0, 0.0], [near, bound.absolute * 2], "loss")
    assert line.verdict == "OUTSIDE"
    assert line.difference == pytest.approx(near - 100.0)


def test_none_equals_none_alone():
    assert JUDGE.compare("x", [math.nan, 1.0], [math.nan, 1.0], "reward").within
    assert not JUDGE.compare("x", [math.nan, 1.0], [0.0, 1.0], "reward").within
    assert JUDGE.compare("x", math.inf, math.inf, "reward").within


def test_another_shape_is_outside():
    line = JUDGE.compare("x", np.zeros(3), np.zeros(4), "mean")
    assert line.within is False and "(3,)" in line.note


def test_lists_name_the_first_row_that_differs():
    line = JUDGE.equal("x", ["a", "b", "c"], ["a", "q", "r"])
    assert line.within is False and line.difference == 2 and "row 1: 'b', not 'q'" in line.note
    assert JUDGE.equal("x", [1, 2], [1, 2]).within
    assert JUDGE.equal("x", [1, 2], [1]).within is False


def test_json_has_no_nan():
    assert Line(0, "x", math.nan, 1.0).as_json()["on_file"] is None
    assert JUDGE.skipped("x", "why").as_json()["verdict"] == "-"


def test_both_dtypes_have_the_same_kinds():
    assert BOUNDS["float32"].keys() == BOUNDS["bfloat16"].keys()
