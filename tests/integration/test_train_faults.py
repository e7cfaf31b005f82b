"""What a user gets when something goes wrong inside a run: one line, the exit code, a checkpoint, nothing torn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REWARDS = """
import time

def raising(completions, **_):
    raise ValueError("no\\nparser")

def short(completions, **_):
    return [1.0]

def not_a_number(completions, **_):
    return [1.0] * (len(completions) - 1) + [float("nan")]

def hanging(completions, **_):
    time.sleep(1000)

def needs_gold(completions, gold, **_):
    return [1.0] * len(completions)
"""


@pytest.mark.parametrize(
    ("function", "processes", "says"),
    [
        ("raising", 2, ["raising", "row", "ValueError"]),
        ("short", 1, ["short", "20", "1"]),
        ("not_a_number", 1, ["not_a_number", "row", "nan"]),
        ("hanging", 2, ["hanging", "3 s"]),
    ],
)
def test_a_bad_reward_function_ends_the_run_with_a_checkpoint(train, tmp_path: Path, function, processes, says) -> None:
    (tmp_path / "mine.py").write_text(REWARDS)
    settings = {"rewards.functions": [{"name": f"{tmp_path}/mine.py:{function}"}], "rewards.timeout": 3}
    ended = train(tmp_path / "run", processes=processes, settings=settings)
    assert ended.returncode == 3, ended.stderr
    assert "Traceback" not in ended.stderr
    line = next(line for line in ended.stderr.splitlines() if line.startswith("vdr: error: "))
    assert all(word in line for word in says), line
    assert (tmp_path / "run" / "checkpoints" / "step_000000" / "manifest.json").is_file()


def test_a_missing_column_is_named_before_any_step(train, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARDS)
    ended = train(tmp_path / "run", settings={"rewards.functions": [{"name": f"{tmp_path}/mine.py:needs_gold"}]})
    assert ended.returncode == 3
    assert "gold" in ended.stderr and "Traceback" not in ended.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_later(sharded, read, tmp_path: Path, number) -> None:
    output = tmp_path / "run"
    flags = ["--output", str(output), "--ds-config", sharded, "--steps", "400"]
    small = ["--set", "train.prompts_per_step=2", "--set", "rollout.group_size=4"]
    command = [sys.executable, "-m", "vdr_cli", "train", *flags, *small]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    wait_for_steps(output, 2)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    assert "Traceback" not in stderr
    done = len(read.metrics(output))
    assert (output / "checkpoints" / f"step_{done:06d}").is_dir()
    resumed = read.vdr("train", *flags[:-1], str(done + 1), *small, "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert len(read.metrics(output)) == done + 1


def test_a_torn_checkpoint_is_reported_and_passed_over(train, tmp_path: Path) -> None:
    settings = {"train.checkpoint_every": 1, "train.keep_last": 3}
    assert train(tmp_path / "run", settings=settings).returncode == 0
    newest = tmp_path / "run" / "checkpoints" / "step_000002"
    victim = next((newest / "engine").glob("*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(bytes(content))
    ended = train(tmp_path / "run", "--resume", "auto", settings={**settings, "train.steps": 3})
    assert ended.returncode == 0, ended.stderr
    assert f"step_000002 passed over: engine/{victim.name} does not match its checksum" in ended.stdout
    assert "step_000001" in ended.stdout


def wait_for_steps(output: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    lines = output / "metrics.jsonl"
    while time.monotonic() < deadline:
        if lines.exists() and len(lines.read_text().splitlines()) >= count:
            return
        time.sleep(0.1)
    raise AssertionError(json.dumps({"no step in": str(output)}))
