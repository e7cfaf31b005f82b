"""Seconds of a step's phases, and the phase that the watchdog is told."""

from __future__ import annotations

import pytest

from vdr_cli.training import timing
from vdr_cli.training.timing import PhaseTimer


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Phases that the watchdog heard of; a clock that goes on by 1 s at each look."""
    seconds = iter(range(1000))
    phases: list[str] = []
    monkeypatch.setattr(timing, "perf_counter", lambda: float(next(seconds)))
    monkeypatch.setattr(timing.watchdog, "phase", phases.append)
    return phases


def test_seconds_of_a_phase_add_up_until_they_are_taken(told: list[str]) -> None:
    timer = PhaseTimer()
    for name in ("rollout", "update", "rollout"):
        with timer.phase(name):
            pass
    assert timer.take() == {"rollout": 2.0, "update": 1.0}
    assert timer.take() == {}
    assert told == ["rollout", "update", "rollout"]


def test_a_nested_phase_counts_in_both(told: list[str]) -> None:
    timer = PhaseTimer()
    with timer.phase("rollout"), timer.phase("rewards"):
        pass
    assert timer.take() == {"rewards": 1.0, "rollout": 3.0}


def test_a_phase_that_fails_counts_too(told: list[str]) -> None:
    timer = PhaseTimer()
    with pytest.raises(ValueError), timer.phase("update"):
        raise ValueError
    assert timer.take() == {"update": 1.0}
