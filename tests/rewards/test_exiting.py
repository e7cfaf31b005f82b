"""os._exit in a reward function is an exception; in what the function forks it ends the fork."""

from __future__ import annotations

import os
import threading

import pytest

from vdr_cli.rewards import exiting


@pytest.fixture(autouse=True)
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Codes with which a fork would have ended. os._exit comes back after the test."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", os._exit)
    monkeypatch.setattr(exiting, "_process", 0)
    monkeypatch.setattr(exiting, "end_process", codes.append)
    return codes


def test_it_raises_here_with_its_code(ended: list[int]) -> None:
    with exiting.exit_is_an_error(), pytest.raises(SystemExit, match=r"^os\._exit\(3\)$"):
        os._exit(3)
    assert ended == []


def test_it_raises_on_other_threads_too(ended: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[BaseException] = []

    def leave() -> None:
        try:
            os._exit(0)
        except SystemExit as error:
            raised.append(error)

    with exiting.exit_is_an_error():
        thread = threading.Thread(target=leave)
        thread.start()
        thread.join()
    assert [str(error) for error in raised] == ["os._exit(0)"]


def test_a_fork_ends_as_it_likes(ended: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    with exiting.exit_is_an_error():
        monkeypatch.setattr(os, "getpid", lambda: -1)  # as a fork sees it
        with pytest.raises(SystemExit):
            os._exit(5)
    assert ended == [5]
