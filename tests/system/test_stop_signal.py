"""The first signal is remembered, several at once are one, and the handlers go back when the run is over."""

from __future__ import annotations

import os
import signal

import pytest

from vdr_cli.system import stopping
from vdr_cli.system.stopping import StopSignal


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes with which the process would have ended."""
    codes: list[int] = []
    monkeypatch.setattr(stopping, "end_process", codes.append)
    return codes


def test_the_first_signal_is_remembered(ended: list[int]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert stop.received == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the terminal, Slurm and a launcher may all pass one on
        assert stop.received == signal.SIGTERM
    assert ended == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_stops_at_once(ended: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((100.0, 100.0 + 2 * stopping.ONE_SIGNAL))
    monkeypatch.setattr(stopping.time, "monotonic", lambda: next(times))
    with StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert ended == [128 + signal.SIGINT]
