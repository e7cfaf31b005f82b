"""Answers of reward processes, and reward files as modules that any process can import."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from vdr_cli.rewards import user_files, worker
from vdr_cli.rewards.base import LoadedReward
from vdr_cli.rewards.processes import RaisedThereError, RewardProcesses

PROGRAMS = Path(__file__).parent / "programs"
REWARDS = (PROGRAMS / "worker_rewards.py").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _os_exit_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", os._exit)  # a call replaces it for the life of its process


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my rewards.py"
    path.write_text(REWARDS)
    return path


def answer(file: Path, name: str) -> tuple[Any, str | None]:
    value, problem, _ = pickle.loads(worker._answer(f"{file}:{name}", {"completions": ["a", "abc"]}))
    return value, problem


def test_a_function_is_answered_with_its_values(file: Path) -> None:
    assert answer(file, "length") == ([1.0, 3.0], None)
    assert answer(file, "waits") == ([0.5, 0.5], None)


@pytest.mark.parametrize(("name", "words"), [("fails", "no such answer"), ("leaves", "3"), ("none", "none")])
def test_what_goes_wrong_is_one_line(file: Path, name: str, words: str) -> None:
    value, problem = answer(file, name)
    assert value is None and problem is not None
    assert words in problem and "\n" not in problem


def test_a_process_that_dies_is_named_and_replaced(file: Path) -> None:
    processes = RewardProcesses(1)
    arguments = {"completions": ["a"]}
    (first,) = processes.call(f"{file}:process", arguments)
    with pytest.raises(RaisedThereError, match=r"^its process ended by SIGKILL$"):
        processes.call(f"{file}:dies", arguments)
    (second,) = processes.call(f"{file}:process", arguments)
    assert second != first
    with pytest.raises(RaisedThereError, match="its arguments cannot go to another process"):
        processes.call(f"{file}:process", {"completions": [lambda: None]})
    with pytest.raises(RaisedThereError, match="no such answer"):
        processes.call(f"{file}:fails", arguments)


def test_an_async_reward_stays_in_its_process() -> None:
    async def waits(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    reward = LoadedReward("waits", 1.0, waits)
    assert RewardProcesses(0).taking("any", reward) is reward


def test_a_reward_file_has_a_name_that_leads_back_to_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = user_files.module_name(file)
    assert name.rpartition(".")[2].startswith("my_rewards_") and name.rpartition(".")[2].isidentifier()
    assert user_files.file_of(name) == file
    module = importlib.import_module(name)
    assert module.length(completions=["ab"]) == [2.0]
    assert sys.path[-1] == str(file.parent), "its neighbours can be imported, and shadow no package"
    assert user_files.file_of("json") is None


def test_files_of_one_name_in_two_directories_are_two_modules(tmp_path: Path) -> None:
    names = {user_files.module_name(tmp_path / folder / "rewards.py") for folder in ("a", "b")}
    assert len(names) == 2
