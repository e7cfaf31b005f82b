"""Functions that only a main thread can run give the right rewards, or the one line that says what to do."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vdr_cli.config import RewardsConfig
from vdr_cli.errors import DataError
from vdr_cli.rewards.base import LoadedReward
from vdr_cli.rewards.calling import compute_rewards
from vdr_cli.rewards.loading import load_rewards
from vdr_cli.rewards.main_thread import watch_signals
from vdr_cli.samples import Prompt

PROGRAMS = Path(__file__).parent / "programs"
SOURCE = (PROGRAMS / "main_thread_rewards.py").read_text(encoding="utf-8")

TEXTS = ["a", "bb"]
GIVEN = [Prompt(row, "p", [0], {}) for row in (3, 4)]
signal.signal(signal.SIGALRM, lambda *_: None)  # a test that fails must not end pytest


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[[str], LoadedReward]]:
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)

    def loaded(name: str) -> LoadedReward:
        cfg = RewardsConfig.model_validate({"functions": [{"name": f"{file}:{name}"}]})
        return load_rewards(cfg, "any")[0]

    yield loaded


def compute(reward: LoadedReward) -> list[float]:
    found: list[float] = compute_rewards([reward], GIVEN, TEXTS, [[1]] * 2, 60.0)[:, 0].tolist()
    return found


@pytest.mark.parametrize(
    ("name", "need"),
    [
        ("plain", "signal.signal"),
        ("careful", "signal.signal"),
        ("awaited", "signal.signal"),
        ("interrupts", "signal.set_wakeup_fd"),
        ("from_a_database", "SQLite objects created in a thread"),
    ],
)
def test_they_move_to_a_process_of_their_own_and_say_so(load, caplog, name: str, need: str) -> None:
    reward = load(name)
    with caplog.at_level(logging.WARNING):
        assert compute(reward) == [1.0, 2.0]
        assert compute(reward) == [1.0, 2.0]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"reward {name} needs the main thread ({need}") and "rewards.processes=1" in line


def test_an_alarm_never_rings_in_the_run(load) -> None:
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        with pytest.raises(DataError, match="its process ended by SIGALRM"):  # nothing handles it there either
            compute(load("alarm_alone"))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not rung


@pytest.mark.parametrize("name", ["on_the_loop", "precise"])
def test_others_stay_on_their_thread(load, caplog, name: str) -> None:
    reward = load(name)
    assert compute(reward) == [1.0, 2.0]
    assert not caplog.records and reward.own_process is not None and not reward.own_process.is_used


def test_an_error_there_names_the_row(load) -> None:
    with pytest.raises(DataError, match=r"reward broken_there raised on dataset row 4: KeyError: 2 \(mine.py:"):
        compute(load("broken_there"))


def test_a_function_without_a_name_in_the_configuration_is_refused() -> None:
    watch_signals()

    def careful(completions: list[str], **_: object) -> list[float]:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        except ValueError:
            return [0.0] * len(completions)
        return [1.0] * len(completions)

    with pytest.raises(DataError, match=r"reward careful needs the main thread \(signal.signal\).*rewards.processes=1"):
        compute(LoadedReward("careful", 1.0, careful))


def test_the_run_itself_sets_signals_as_ever() -> None:
    watch_signals()
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    assert signal.signal(signal.SIGUSR2, before) is signal.SIG_IGN
    caught: list[Exception] = []

    def elsewhere() -> None:
        try:
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        except ValueError as error:
            caught.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert len(caught) == 1
