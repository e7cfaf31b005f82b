"""The adaptive weight of the entropy bonus, by hand."""

from __future__ import annotations

import math

import pytest

from vdr_cli.grpo.entropy_control import EntropyControl

TARGET, DELTA, MAXIMUM = 0.2, 1e-4, 3e-4


def weights(entropies: list[float]) -> list[float]:
    """The weight of every rollout, when they have these entropies."""
    control, found = EntropyControl(), []
    for entropy in entropies:
        found.append(control.weight(TARGET))
        control.follow(entropy, TARGET, DELTA, MAXIMUM)
    return found


@pytest.mark.parametrize(
    ("entropies", "expected"),
    [
        ([0.1] * 6, [0.0, 1e-4, 2e-4, 3e-4, 3e-4, 3e-4]),  # rises to the maximum
        ([0.5] * 3, [0.0, 0.0, 0.0]),  # never below 0
        ([0.1, 0.1, 0.5, 0.1, 0.1], [0.0, 1e-4, 2e-4, 0.0, 2e-4]),  # falls to 1e-4 above the target, and rests there
        ([0.1, 0.2, 0.2], [0.0, 1e-4, 0.0]),  # at the target it falls
        ([0.1, math.nan, 0.1], [0.0, 1e-4, 1e-4]),  # a step without an entropy
    ],
)
def test_it_rises_below_the_target_and_acts_only_there(entropies: list[float], expected: list[float]) -> None:
    assert weights(entropies) == pytest.approx(expected)


def test_at_the_target_it_acts() -> None:
    assert EntropyControl(2e-4, TARGET).weight(TARGET) == 2e-4
    assert EntropyControl(2e-4, math.nextafter(TARGET, 1)).weight(TARGET) == 0.0


def test_its_state_is_the_whole_of_it() -> None:
    control = EntropyControl()
    control.follow(0.1, TARGET, DELTA, MAXIMUM)
    assert EntropyControl(**control.state_dict()) == control
