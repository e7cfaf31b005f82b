"""Reward functions in processes of their own: the same answers and errors, and nothing they do takes the run along."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from vdr_cli.config import RewardsConfig
from vdr_cli.errors import DataError
from vdr_cli.rewards.base import LoadedReward, TrainerState
from vdr_cli.rewards.calling import compute_rewards
from vdr_cli.rewards.loading import load_rewards
from vdr_cli.rewards.stream import RewardStream
from vdr_cli.samples import Completions, Prompt

PROGRAMS = Path(__file__).parent / "programs"
SOURCE = (PROGRAMS / "process_rewards.py").read_text(encoding="utf-8")

ROWS = [7, 7, 12, 12]
TEXTS = ["a", "bb", "ccc", "dddd"]
STATE = TrainerState(1000, 2000)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., list[LoadedReward]]:
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)

    def loaded(*names: str, processes: int = 1) -> list[LoadedReward]:
        functions = [{"name": f"{file}:{name}"} for name in names]
        return load_rewards(RewardsConfig.model_validate({"functions": functions, "processes": processes}), "any")

    return loaded


def prompts() -> list[Prompt]:
    return [Prompt(row, f"prompt {row}", [0], {"answer": row * 10}) for row in ROWS]


def compute(loaded: list[LoadedReward], timeout: float = 60.0) -> torch.Tensor:
    return compute_rewards(loaded, prompts(), TEXTS, [[1]] * 4, timeout, STATE)


def failure(loaded: list[LoadedReward], timeout: float = 60.0) -> str:
    with pytest.raises(DataError) as caught:
        compute(loaded, timeout)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_answers_are_those_of_a_thread(load: Any) -> None:
    names = ("plain", "array", "around", "later", "fallen")
    there, here = compute(load(*names)), compute(load(*names, processes=0))
    assert torch.equal(there.nan_to_num(-1.0), here.nan_to_num(-1.0))
    assert there[1].tolist() == [1072.0, 1.0, 2.0, 2.0, 1.0]


def test_a_function_shows_its_own_parameters(load: Any) -> None:
    plain, later = load("plain", "later")
    assert plain.required_columns() == ["answer"]
    assert later.is_async and not plain.is_async


def line_of(code: str) -> int:
    """The line of the rewards' file with this code."""
    return next(number for number, line in enumerate(SOURCE.splitlines(), start=1) if code in line)


def test_errors_name_the_row_and_the_line(load: Any) -> None:
    fails, leaves, ends = (f"(mine.py:{line_of(code)})" for code in ("{70: 1.0}[a]", "SystemExit(3)", "os._exit(0)"))
    assert failure(load("fails")) == f"reward fails raised on dataset row 12: KeyError: 120 {fails}"
    assert f"reward leaves raised on dataset row 7: SystemExit: 3 {leaves}" in failure(load("leaves"))
    assert f"reward ends raised on dataset row 7: SystemExit: os._exit(0) {ends}" in failure(load("ends"))
    assert "reward words returned 'good' for a completion of dataset row 7" in failure(load("words"))


def test_environments_stay_where_nobody_asks_for_them(load: Any) -> None:
    """They may hold a browser or a lock; a function that takes any keyword does not thereby need them."""
    loaded = load("array")
    found = compute_rewards(loaded, prompts(), TEXTS, [[1]] * 4, 60.0, STATE, [threading.Lock()] * 4)
    assert torch.equal(found, compute(loaded))


def test_what_cannot_travel_is_said_in_a_line(load: Any) -> None:
    assert "reward local raised on dataset row 7: " in failure(load("local"))
    (plain,) = load("plain")
    given = [Prompt(0, "p", [0], {"answer": threading.Lock()})]
    with pytest.raises(DataError, match=r"row 0: its arguments cannot go to another process: cannot pickle .*lock"):
        compute_rewards([plain], given, ["a"], [[1]], 60.0, STATE)


def test_a_function_that_hangs_inside_c_is_named_in_time(load: Any) -> None:
    loaded = load("plain", "runaway")
    compute(loaded[:1])  # the worker is up
    message = failure(loaded, timeout=2.0)
    assert message.startswith("reward runaway had not returned after 2 s on dataset rows 7, 12")


def test_a_function_that_kills_its_process_is_named_and_others_go_on(load: Any) -> None:
    crashes, plain = load("crashes", "plain")
    assert failure([crashes]) == "reward crashes raised on dataset row 12: its process ended by SIGSEGV"
    assert compute([plain])[1].tolist() == [1072.0]


def test_ready_groups_are_shared_out_among_the_processes(load: Any) -> None:
    ids = torch.ones((4, 1), dtype=torch.int64)
    batch = Completions(ids, ids.bool(), ids, ids.bool(), torch.zeros((4, 1)), torch.zeros(4).bool())
    groups = [Prompt(row, "p", [0], {}) for row in (7, 12)]
    stream = RewardStream(load("where", processes=2), groups, 2, 60.0, STATE, lambda _, given: ["a"] * len(given))
    stream.finished([0, 1], batch)
    rewards = stream.result()[1][:, 0]
    assert rewards[0] == rewards[1] != rewards[2] == rewards[3]
    assert os.getpid() not in rewards.tolist()


KILLED = """
import sys
from vdr_cli.config import RewardsConfig
from vdr_cli.rewards.loading import load_rewards
config = {"functions": [{"name": sys.argv[1]}], "processes": 1}
(reward,) = load_rewards(RewardsConfig.model_validate(config), "any")
print("up", flush=True)
reward.function(completions=["a"])
"""


@pytest.mark.usefixtures("load")
def test_no_process_outlives_a_run_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, f"{tmp_path}/mine.py:runaway"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline() == "up\n"
    (worker,) = psutil.Process(run.pid).children()
    while worker.cpu_times().user < 1.0:  # it computes
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    worker.wait(30)
