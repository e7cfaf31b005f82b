"""What a user gets when something goes wrong inside a run: one line, the exit code, a checkpoint, nothing torn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

REWARDS = """
import os, signal, time

def raising_on_rank_1(completions, **_):
    if os.environ["RANK"] == "1":
        raise ValueError("no\\nparser")
    return [1.0] * len(completions)

def killing_rank_1(completions, **_):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return [1.0] * len(completions)

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
        ("raising_on_rank_1", 2, ["raising_on_rank_1", "row", "ValueError"]),
        ("short", 1, ["short", "returned 1 rewards for"]),
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


def test_a_reward_function_that_kills_its_process_ends_the_run_on_all_ranks(train, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARDS)
    settings = {"rewards.functions": [{"name": f"{tmp_path}/mine.py:killing_rank_1"}], "launch.fault_timeout": 5}
    ended = train(tmp_path / "run", processes=2, settings=settings)
    assert ended.returncode == 4, ended.stderr
    assert "rank 1: ended without a word" in ended.stderr
    assert json.loads((tmp_path / "run" / "fault.json").read_text())["rank"] == 1
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path / "run") in (p.info["cmdline"] or ())]


HUNG = """
import re, sys
from vdr_cli.rewards import calling
from vdr_cli.rewards.base import LoadedReward
from vdr_cli.rewards.loading import load_rewards
from vdr_cli.config import Config
from vdr_cli.rollout.base import Prompt
calling.SEARCH_SECONDS = 0.5
config = Config.model_validate({"rewards": {"functions": [{"name": sys.argv[1]}]}})
rewards = load_rewards(config.rewards, "rows.jsonl")
prompt = Prompt(row=0, value="p", token_ids=[1], columns={})
calling.compute_rewards(rewards, [prompt], ["a" * 60], [[1]], timeout=0.5)
"""


def test_a_reward_function_that_never_lets_go_of_the_interpreter_is_ended(tmp_path: Path) -> None:
    """A runaway regular expression: no thread of Python runs beside it, so no time limit in Python can act."""
    (tmp_path / "mine.py").write_text(
        "import re\ndef runaway(completions, **_):\n    return [len(re.findall('(a+)+$', completions[0] + '!'))]\n"
    )
    command = [sys.executable, "-c", HUNG, f"{tmp_path}/mine.py:runaway"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode != 0
    assert "in runaway" in ended.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB; a checkpoint of the starter takes 13 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("needs root (a small tmpfs)")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


FILLING = """
import os, pathlib
from vdr_cli.starter.countdown import countdown
DISK = pathlib.Path(os.environ["DISK"])

def filling(completions, trainer_state, **columns):
    # The task's reward. From step FULL on nothing fits on the disk, from step FREE on everything.
    step = trainer_state.global_step + 1
    if os.environ["RANK"] == "0" and int(os.environ["FULL"]) <= step < int(os.environ["FREE"]):
        with (DISK / "filler").open("ab", buffering=0) as filler:
            try:
                while filler.write(bytes(4096)):
                    pass
            except OSError:
                pass
    if os.environ["RANK"] == "0" and step == int(os.environ["FREE"]):
        (DISK / "filler").unlink(missing_ok=True)
    return countdown(completions, **columns)
"""


def on_a_full_disk(tmp_path: Path, disk: Path, full: int, free: int) -> tuple[Path, dict[str, object], dict[str, str]]:
    """(run directory, settings, environment) of a run whose disk is full between two of its steps."""
    (tmp_path / "mine.py").write_text(FILLING)
    settings = {
        "rewards.functions": [{"name": f"{tmp_path}/mine.py:filling"}],
        "train.checkpoint_every": 1,
        "train.steps": 5,
        "train.keep_last": 1,
    }
    return disk / "run", settings, {"DISK": str(disk), "FULL": str(full), "FREE": str(free)}


def test_a_full_disk_costs_a_run_nothing_that_was_complete(
    train, read, small_disk: Path, tmp_path: Path, monkeypatch
) -> None:
    """Full from the third step to the fifth: checkpoints and completions of two steps are missing, nothing else."""
    run, settings, environment = on_a_full_disk(tmp_path, small_disk, 3, 5)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ended = train(run, processes=2, settings=settings)
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout
    assert "checkpoint under" in said and "the one before is intact; going on" in said
    assert "completions cannot be written" in said
    assert [line["step"] for line in read.metrics(run)] == [1, 2, 3, 4, 5]
    assert [path.stem for path in sorted((run / "completions").iterdir())] == [f"step_00000{n}" for n in (1, 2, 5)]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000005"]


def test_a_disk_that_stays_full_ends_the_run_with_one_line(
    train, read, small_disk: Path, tmp_path: Path, monkeypatch
) -> None:
    run, settings, environment = on_a_full_disk(tmp_path, small_disk, 3, 99)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ended = train(run, settings=settings)
    assert ended.returncode == 4
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("vdr")]
    assert line.startswith("vdr: error: checkpoint under") and "(0 MiB free on the disk)" in line
    assert "Traceback" not in ended.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000002"]
    (small_disk / "filler").unlink()
    monkeypatch.setenv("FULL", "99")
    ended = train(run, "--resume", "auto", settings=settings)
    assert ended.returncode == 0, ended.stderr
    assert [line["step"] for line in read.metrics(run)] == [1, 2, 3, 4, 5]


def test_a_missing_column_is_named_before_any_step(train, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARDS)
    ended = train(tmp_path / "run", settings={"rewards.functions": [{"name": f"{tmp_path}/mine.py:needs_gold"}]})
    assert ended.returncode == 3
    assert "gold" in ended.stderr and "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_row_that_one_rank_cannot_use_ends_both_with_a_checkpoint(train, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    prompts = ["1 2 3=6:"] * 9 + ["1 2 3=6:" * 9]
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    settings = {"data.name": str(data), "data.shuffle": False, "rewards.functions": [{"name": "length"}]}
    ended = train(tmp_path / "run", processes=2, settings=settings)
    assert ended.returncode == 3, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("vdr")]
    assert f"{data} line 10: the prompt has 72 tokens; the model's length leaves 57" in line
    assert (tmp_path / "run" / "checkpoints" / "step_000001" / "manifest.json").is_file()


def signal_all(process: subprocess.Popen[str], number: int) -> None:
    """To every process of a job, as Slurm does before it takes the nodes away, and as Ctrl-C in a terminal does."""
    everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in everybody:
        each.send_signal(number)


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_a_signal_saves_and_the_run_goes_on_later(sharded, read, tmp_path: Path, number, processes) -> None:
    output = tmp_path / "run"
    flags = ["--output", str(output), "--ds-config", sharded, "--num-processes", str(processes), "--steps", "400"]
    small = ["--set", "train.prompts_per_step=2", "--set", "rollout.group_size=4"]
    command = [sys.executable, "-m", "vdr_cli", "train", *flags, *small]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    wait_for_steps(output, 2)
    signal_all(process, number)
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
