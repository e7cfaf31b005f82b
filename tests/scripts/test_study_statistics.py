"""The simulation of scripts/verify/study_statistics.py, with fewer studies; benchmarks/ has its full numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.verify import study_statistics as simulation

SHAPE = 20, 64
RESULTS = Path(__file__).parents[2] / "benchmarks" / "study_statistics.json"


@pytest.mark.parametrize("world", ["seeds alone differ", "the effect depends on the problem"])
def test_the_interval_covers_and_the_bootstrap_over_seeds_does_not(world: str) -> None:
    """300 studies: a standard error of 1.3 %."""
    found = simulation.coverage(simulation.WORLDS[world], SHAPE, studies=300, seed=5)
    assert 0.92 <= found["study"] <= 0.985
    assert found["percentile over seeds"] < found["study"]


def test_a_study_in_which_nothing_differs_rarely_names_an_arm() -> None:
    """150 studies: at 5 %, 13 or fewer with probability 0.98."""
    assert simulation.false_positives(10, SHAPE, studies=150, seed=6) <= 13 / 150


def test_a_difference_of_one_deviation_is_found_among_ten_arms() -> None:
    assert simulation.power(10, SHAPE, studies=60, seed=7) >= 0.65


def test_the_effect_of_one_deviation_is_one() -> None:
    generator = np.random.default_rng(0)
    effect = simulation.one_deviation(SHAPE, generator)
    tables = [simulation.differences(simulation.World(effect=effect), SHAPE, generator) for _ in range(200)]
    null = [simulation.differences(simulation.World(), SHAPE, generator).mean(1).std(ddof=1) for _ in range(200)]
    assert np.mean([table.mean() for table in tables]) == pytest.approx(np.mean(null), rel=0.15)


def test_the_published_numbers_keep_the_promises() -> None:
    results = json.loads(RESULTS.read_text())["results"]
    assert results["seeds"] == 20 and results["studies"] >= 2000
    assert all(0.93 <= world["study"] <= 0.97 for world in results["coverage"].values())
    assert results["false positives with 10 arms"] <= 0.05 + 2 * 0.005
    assert results["power for one standard deviation"]["ten arms"] >= 0.8
