"""The first signal is remembered, several at once are one, and the handlers go back when the run is over."""

from __future__ import annotations

import os
import signal
import sys

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


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second signal comes later than a copy of the first one would."""
    times = iter((100.0, 100.0 + 2 * stopping.ONE_SIGNAL))
    monkeypatch.setattr(stopping.time, "monotonic", lambda: next(times))


@pytest.mark.usefixtures("later")
def test_a_second_signal_ends_a_command_at_once(ended: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_command", True)
    monkeypatch.setattr(stopping, "end_process", lambda code: ended.append(code) or sys.exit(code))
    with pytest.raises(SystemExit), StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert ended == [128 + signal.SIGINT]


@pytest.mark.usefixtures("later")
def test_a_second_signal_elsewhere_can_be_caught(ended: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook goes on."""
    monkeypatch.setattr(stopping, "_command", False)
    with pytest.raises(KeyboardInterrupt), StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert ended == []
