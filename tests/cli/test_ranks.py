"""`vdr eval` and `vdr score` as the one process, as a rank, and as what starts the ranks."""

from __future__ import annotations

import pytest
import typer

from vdr_cli.cli import ranks
from vdr_cli.config import LaunchConfig
from vdr_cli.launch import environment, reexec, watchdog


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A record of what happened, in order; nothing is started."""
    seen: list[str] = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def launch(_: LaunchConfig, arguments: list[str]) -> int:
        seen.append(f"launch {' '.join(arguments)}")
        return 7

    monkeypatch.setattr(reexec, "launch", launch)
    monkeypatch.setattr(environment, "prepare_process", lambda _: seen.append("prepare"))
    monkeypatch.setattr(watchdog, "end", lambda error=None: seen.append(f"end {error!r}"))
    return seen


def become_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))


def test_alone_the_work_is_done_here(events: list[str]) -> None:
    ranks.on_ranks(LaunchConfig(), ["eval"], lambda: events.append("work"))
    assert events == ["work"]


def test_a_variable_that_a_launcher_left_makes_no_rank(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    ranks.on_ranks(LaunchConfig(), ["eval"], lambda: events.append("work"))
    assert events == ["work"]


def test_several_processes_are_started_with_the_same_arguments(events: list[str]) -> None:
    with pytest.raises(typer.Exit) as ended:
        ranks.on_ranks(LaunchConfig(num_processes=2), ["eval", "starter"], lambda: events.append("work"))
    assert (events, ended.value.exit_code) == (["launch eval starter"], 7)


def test_a_rank_prepares_itself_before_the_work(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    become_rank(monkeypatch, 1)
    ranks.on_ranks(LaunchConfig(num_processes=2), ["eval"], lambda: events.append("work"))
    assert events == ["prepare", "work", "end None"]


def test_a_rank_that_fails_tells_the_others(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    become_rank(monkeypatch, 0)

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        ranks.on_ranks(LaunchConfig(), ["eval"], fail)
    assert events == ["prepare", "end ValueError('no')"]
