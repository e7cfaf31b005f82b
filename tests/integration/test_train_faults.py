"""Faults inside a run: the user gets one line, the exit code and a checkpoint, and nothing is torn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

PROGRAMS = Path(__file__).parent / "programs"
REWARDS = (PROGRAMS / "faulty_rewards.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("function", "started", "says"),
    [
        ("raising_on_rank_1", {"ranks": 2}, ["raising_on_rank_1", "row", "ValueError"]),
        ("exiting_on_rank_1", {"ranks": 2}, ["exiting_on_rank_1", "row", "SystemExit: 0"]),
        ("interrupting_on_rank_1", {"ranks": 2}, ["interrupting_on_rank_1", "row", "KeyboardInterrupt"]),
        ("short", {}, ["short", "returned 1 rewards for"]),
        ("not_a_number", {}, ["not_a_number", "row", "nan"]),
        ("hanging", {"processes": 2}, ["hanging", "3 s"]),
    ],
)
def test_a_bad_reward_function_ends_the_run_with_a_checkpoint(train, tmp_path: Path, function, started, says) -> None:
    (tmp_path / "mine.py").write_text(REWARDS)
    settings = {"rewards.functions": [{"name": f"{tmp_path}/mine.py:{function}"}], "rewards.timeout": 3}
    ended = train(tmp_path / "run", **started, settings=settings)
    assert ended.returncode == 3, ended.stderr
    assert "Traceback" not in ended.stderr
    line = next(line for line in ended.stderr.splitlines() if line.startswith("vdr: error: "))
    assert all(word in line for word in says), line
    assert (tmp_path / "run" / "checkpoints" / "step_000000" / "manifest.json").is_file()


@pytest.mark.parametrize(("function", "restarts"), [("killing_rank_1", 0), ("leaving_rank_1", 1)])
def test_a_reward_function_that_ends_its_process_ends_the_run_on_all_ranks(
    train, tmp_path: Path, function, restarts
) -> None:
    """Again after a restart, where one was asked for."""
    (tmp_path / "mine.py").write_text(REWARDS)
    settings = {"rewards.functions": [{"name": f"{tmp_path}/mine.py:{function}"}], "launch.fault_timeout": 5}
    ended = train(tmp_path / "run", "--max-restarts", str(restarts), processes=2, settings=settings)
    assert ended.returncode == 4, ended.stderr
    assert ended.stderr.count("vdr: host") >= 1 + restarts and "rank 1: ended without a word" in ended.stderr
    assert ended.stderr.count("; restart 1 of 1 from the newest checkpoint") == restarts
    assert json.loads((tmp_path / "run" / "fault.json").read_text())["rank"] == 1
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path / "run") in (p.info["cmdline"] or ())]


def test_a_reward_function_may_use_a_pool_of_processes(train, read, tmp_path: Path) -> None:
    """multiprocessing ends its workers with SIGTERM, which is no word to the run."""
    (tmp_path / "mine.py").write_text(REWARDS)
    settings = {"rewards.functions": [{"name": f"{tmp_path}/mine.py:pooled"}], "launch.fault_timeout": 1}
    ended = train(tmp_path / "run", settings={**settings, "train.steps": 4})
    assert ended.returncode == 0, ended.stderr
    assert len(read.metrics(tmp_path / "run")) == 4


HUNG = (PROGRAMS / "runaway_reward.py").read_text(encoding="utf-8")


def test_a_reward_function_that_never_lets_go_of_the_interpreter_is_ended(tmp_path: Path) -> None:
    """A runaway regular expression: no thread of Python runs beside it, so no time limit in Python can act."""
    (tmp_path / "mine.py").write_text(
        "import re\ndef runaway(completions, **_):\n    return [len(re.findall('(a+)+$', completions[0] + '!'))]\n"
    )
    command = [sys.executable, "-c", HUNG, f"{tmp_path}/mine.py:runaway"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode != 0
    assert "in runaway" in ended.stderr


def test_a_missing_column_is_named_before_any_step(train, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARDS)
    ended = train(tmp_path / "run", settings={"rewards.functions": [{"name": f"{tmp_path}/mine.py:needs_gold"}]})
    assert ended.returncode == 3
    assert "gold" in ended.stderr and "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_row_that_the_model_cannot_read_is_found_before_any_step(train, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    prompts = ["1 2 3=6:"] * 9 + ["1 2 3=6:" * 9]
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    settings = {"data.name": str(data), "data.shuffle": False, "rewards.functions": [{"name": "length"}]}
    ended = train(tmp_path / "run", ranks=2, settings=settings)
    assert ended.returncode == 3, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("vdr")]
    assert f"{data} line 10: the prompt has 72 tokens; the model's length leaves 57" in line
    assert not (tmp_path / "run").exists()


def test_a_row_that_one_rank_cannot_use_ends_both_with_a_checkpoint(train, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": "1 2 3=6:", "gold": number}) + "\n" for number in range(10)))
    (tmp_path / "mine.py").write_text("def odd(prompts, gold, **_):\n    return [1 / (9 - each) for each in gold]\n")
    settings = {
        "data.name": str(data),
        "data.shuffle": False,
        "rewards.functions": [{"name": f"{tmp_path}/mine.py:odd"}],
    }
    ended = train(tmp_path / "run", ranks=2, settings=settings)
    assert ended.returncode == 3, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("vdr")]
    assert "odd raised on dataset row 9: ZeroDivisionError" in line
    assert (tmp_path / "run" / "checkpoints" / "step_000001" / "manifest.json").is_file()


def test_a_failed_evaluation_is_made_up_for(train, read, tmp_path: Path) -> None:
    """The step before it is saved. The resumed run evaluates it first, at the end of the run too."""
    for split in ("train", "held_out"):
        rows = [json.dumps({"prompt": f"{number} 2 3=6:", "split": split}) + "\n" for number in range(8)]
        (tmp_path / f"{split}.jsonl").write_text("".join(rows))
    settings = {
        "data.name": f"{tmp_path}/train.jsonl",
        "data.eval_name": f"{tmp_path}/held_out.jsonl",
        "rewards.functions": [{"name": f"{tmp_path}/mine.py:mine"}],
        "train.steps": 4,
        "train.eval_every": 2,
        "train.eval_prompts": 4,
    }
    reward = "from pathlib import Path\ndef mine(completions, split, **_):\n{}    return list(map(len, completions))\n"

    def failing(step: int) -> str:
        before = tmp_path / "run" / "completions" / f"step_{step - 1:06d}.parquet"
        return f"    assert split[0] == 'train' or not Path({str(before)!r}).exists()\n"

    for step, resume in ((2, ()), (4, ("--resume", "auto"))):
        (tmp_path / "mine.py").write_text(reward.format(failing(step)))
        ended = train(tmp_path / "run", *resume, ranks=2, settings=settings)
        assert ended.returncode == 3 and "AssertionError" in ended.stderr, ended.stderr
        assert (tmp_path / "run" / "checkpoints" / f"step_{step:06d}" / "manifest.json").is_file()
        assert read.metrics(tmp_path / "run")[-1].keys() & {"step", "loss", "eval/pass@1"} == {"step", "loss"}
    (tmp_path / "mine.py").write_text(reward.format(""))
    for run, resume in (("run", ("--resume", "auto")), ("whole", ())):
        ended = train(tmp_path / run, *resume, ranks=2, settings=settings)
        assert ended.returncode == 0, ended.stderr
    mine, whole = read.metrics(tmp_path / "run"), read.metrics(tmp_path / "whole")
    assert [line["step"] for line in whole if "eval/pass@1" in line] == [0, 2, 4]
    assert mine == whole
    mine, whole = read.completions(tmp_path / "run"), read.completions(tmp_path / "whole")
    assert len(whole) == 4 and mine == whole


def signal_all(process: subprocess.Popen[str], number: int) -> None:
    """To every process of a job, as Slurm does before it takes the nodes away, and as Ctrl-C in a terminal does."""
    everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in everybody:
        each.send_signal(number)


SLOW_WANDB = """
import subprocess, sys
from pathlib import Path
from types import SimpleNamespace

util = SimpleNamespace(generate_id=lambda: "id")

def init(dir, **_):
    def finish():
        subprocess.run([sys.executable, "-c", "import time; time.sleep(4)"], check=True)
        Path(dir, "uploaded").touch()

    return SimpleNamespace(log=lambda metrics, step: None, finish=finish)
"""
"""A module `wandb` whose last upload, by a process of its own, takes seconds."""


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_a_signal_saves_and_the_run_goes_on_later(sharded, forked, read, tmp_path: Path, number, processes) -> None:
    """Weights & Biases uploads the rest before a launcher ends the ranks."""
    output = tmp_path / "run"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(SLOW_WANDB)
    flags = ["--output", str(output), "--ds-config", sharded]
    flags += ["--set", "train.prompts_per_step=2", "--set", "rollout.group_size=4", "--steps"]
    command = [sys.executable, "-m", "vdr_cli", "train", "--num-processes", str(processes), *flags, "400"]
    command += ["--set", "observe.wandb=true"]
    paths = f"{tmp_path / 'modules'}:{os.environ.get('PYTHONPATH', '')}"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    try:
        wait_for_steps(output, 2)
        signal_all(process, number)
        _, stderr = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            signal_all(process, signal.SIGKILL)
    assert process.returncode == 128 + number, stderr
    assert "Traceback" not in stderr
    assert (output / "uploaded").exists()
    done = len(read.metrics(output))
    assert (output / "checkpoints" / f"step_{done:06d}").is_dir()
    more = ("--resume", "auto", "--set", "observe.wandb=false")
    resumed = forked("train", *flags, str(done + 1), *more, ranks=processes)
    assert resumed.returncode == 0, resumed.stderr
    assert len(read.metrics(output)) == done + 1


SLOW = """
import time
def slow(completions, **_):
    time.sleep(3)
    return list(map(len, completions))
"""


def test_a_step_longer_than_the_timeout_is_saved_after_a_signal(sharded, read, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SLOW)
    output = tmp_path / "run"
    flags = ["--output", str(output), "--ds-config", sharded, "--reward", f"{tmp_path}/mine.py:slow", "--steps", "400"]
    flags += ["--max-restarts", "1"]  # with a supervisor
    for setting in ("launch.fault_timeout=1", "train.prompts_per_step=2", "rollout.group_size=4"):
        flags += ["--set", setting]
    command = [sys.executable, "-m", "vdr_cli", "train", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    try:
        wait_for_steps(output, 2)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            signal_all(process, signal.SIGKILL)
    assert process.returncode == 128 + signal.SIGTERM and "not done" not in stderr, stderr
    assert (output / "checkpoints" / f"step_{len(read.metrics(output)):06d}").is_dir()


def wait_for_steps(output: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    lines = output / "metrics.jsonl"
    while time.monotonic() < deadline:
        if lines.exists() and len(lines.read_text().splitlines()) >= count:
            return
        time.sleep(0.1)
    raise AssertionError(json.dumps({"no step in": str(output)}))
