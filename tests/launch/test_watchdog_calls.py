"""The module's calls in the life of one process. Ranks that lose each other: test_watchdog.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vdr_cli.errors import DataError
from vdr_cli.launch import outcome, watchdog
from vdr_cli.launch.environment import single_process


class Recorder:
    """In place of the thread: what it was told."""

    def __init__(self, directory: Any, timeout: float) -> None:
        self.directory, self.timeout = directory, timeout
        self.phase = "start"
        self.events: list[Any] = []

    def connect(self, *arguments: Any) -> None:
        self.events.append(("connect", *arguments[:2]))

    def end(self, error: BaseException | None) -> None:
        self.events.append(("end", error))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    monkeypatch.setattr(watchdog, "Watchdog", Recorder)
    monkeypatch.setattr(watchdog, "_watchdog", None)
    monkeypatch.setattr(watchdog, "_watches_forks", True)  # hooks at a fork stay for the life of the process
    watchdog.begin("runs/a", 5.0)
    assert isinstance(watchdog._watchdog, Recorder)
    yield watchdog._watchdog


def test_one_watchdog_per_process(recorder: Recorder) -> None:
    watchdog.begin("runs/b", 9.0)
    assert watchdog._watchdog is recorder
    assert (str(recorder.directory), recorder.timeout) == ("runs/a", 5.0)


def test_the_phase_is_what_the_last_line_will_name(recorder: Recorder) -> None:
    watchdog.phase("rollout")
    assert recorder.phase == "rollout"


def test_ranks_are_watched_inside_the_block_and_left_after_it(recorder: Recorder) -> None:
    with watchdog.connected(0, 2, lambda value: value):
        assert recorder.events == [("connect", 0, 2)]
    assert recorder.events[-1] == ("end", None)
    watchdog.phase("after")
    assert recorder.phase == "start", "nobody is watched any more"


def test_a_block_that_fails_says_why(recorder: Recorder) -> None:
    error = DataError("row 3")
    with pytest.raises(DataError), watchdog.connected(0, 2, lambda value: value):
        raise error
    assert recorder.events[-1] == ("end", error)


def test_without_a_watchdog_every_call_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_watchdog", None)
    met: list[object] = []
    watchdog.phase("rollout")
    watchdog.note_step(3.0)
    watchdog.end(ValueError())
    with watchdog.connected(0, 2, lambda value: met.append(value)):
        pass
    assert watchdog._watchdog is None and met == [], "no thread, and no rank is asked to meet"


ALONE = single_process()


@pytest.mark.parametrize(
    ("environ", "is_forgotten"),
    [
        ({}, True),
        (ALONE, True),  # as `vdr train` makes itself, in its only process
        ({**ALONE, "VDR_RUN_DIRECTORY": "run"}, False),
        ({**ALONE, "WORLD_SIZE": "2"}, False),
    ],
)
def test_an_old_request_to_stop_is_forgotten(
    environ: dict[str, str], is_forgotten: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch clears it before it starts ranks; a process that nobody launched does so itself."""
    monkeypatch.setattr(watchdog, "_watchdog", None)
    monkeypatch.setattr(watchdog, "Watchdog", lambda *_: None)
    monkeypatch.setattr(watchdog, "_watches_forks", True)
    for name in (*ALONE, "VDR_RUN_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    outcome.ask_to_stop(tmp_path, 15)
    watchdog.begin(str(tmp_path), 5.0)
    assert (outcome.asked_to_stop(tmp_path) is None) == is_forgotten
