"""A study of three arms and three seeds on the starter: undisturbed, and in two shards that are killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import environment

FORKS = Path(__file__).parent / "programs" / "study_forks.py"
ROOT = Path(__file__).parents[2]
STUDY = """\
output: {folder}
base:
  train: {{prompts_per_step: 1, checkpoint_every: 9, keep_last: 1}}
  rollout.group_size: 4
  disagreement.members: 2
  engine.ds_config: zero1
  observe: {{completions_every: 0, audit_every: 0}}
arms:
  grpo: {{disagreement.mode: none}}
  default: {{}}
  leave_one_out: {{disagreement.mode: none, grpo.advantage: leave_one_out}}
control: grpo
seeds: 3
budget: {{steps: 28}}
endpoint: pass@8
evaluation: {{prompts: 12, samples: 16, start_samples: 32}}
"""


class Call:
    """One `vdr study`, started."""

    def __init__(self, forks: subprocess.Popen[str], arguments: list[str], said: Path) -> None:
        self.forks, self.said = forks, said
        self.pid = int(self.ask({"arguments": arguments, "said": str(said)}))

    def ask(self, question: Any) -> str:
        assert self.forks.stdin is not None and self.forks.stdout is not None
        print(json.dumps(question), file=self.forks.stdin, flush=True)
        return self.forks.stdout.readline()

    def wait(self) -> tuple[int, str]:
        """The exit code, and everything it said."""
        return int(self.ask(self.pid)), self.said.read_text()


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Call]]:
    """call(*arguments): `vdr study` in a fork."""
    folder = tmp_path_factory.mktemp("said")
    env = environment(PYTHONPATH=str(ROOT))
    forks = subprocess.Popen(
        [sys.executable, str(FORKS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    count = iter(range(99))
    yield lambda *arguments: Call(forks, [str(one) for one in arguments], folder / f"{next(count)}.txt")
    os.killpg(forks.pid, signal.SIGKILL)
    forks.wait()


def written(folder: Path) -> Path:
    folder.mkdir()
    path = folder / "study.yaml"
    path.write_text(STUDY.format(folder=folder / "study"))
    return path


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 500
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps_of(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.is_file() else 0


def in_training(call: Call, study: Path) -> psutil.Process | None:
    """A process of the call, known by its lock, whose run is past its first checkpoint and not yet near its end."""
    for process in psutil.Process(call.pid).children():
        files: list[Path] = []
        with suppress(psutil.NoSuchProcess):
            files = [Path(opened.path) for opened in process.open_files()]
        for file in files:
            if file.suffix == ".lock" and 10 <= steps_of(study / file.relative_to(study / "work").with_suffix("")) < 24:
                return process
    return None


def locked(path: Path) -> bool:
    """Some process holds flock(2) on the file."""
    return path.exists() and f":{path.stat().st_ino} " in Path("/proc/locks").read_text()


def evaluated(study: Path) -> int:
    return len(list((study / "runs").glob("*/*/*/evaluation.json")))


def test_killed_and_in_shards_a_study_says_what_it_says_undisturbed(call: Any, tmp_path: Path) -> None:
    whole, parts = written(tmp_path / "whole"), written(tmp_path / "parts")
    code, said = call(whole, "--jobs", 2).wait()
    assert code == 0, said
    assert "10/10" in said and "with 3 seeds and 2 comparisons" in said

    study = tmp_path / "parts" / "study"
    first, second = (["--shard", f"{number}/2"] for number in (1, 2))
    running = call(parts, *first)
    wait_for(lambda: evaluated(study) >= 1 and in_training(running, study) is not None)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait()[0] == -signal.SIGKILL

    running = call(parts, *first)  # while the run of the killed study may still write its checkpoint
    beside = call(parts, *second)
    wait_for(lambda: locked(study / "work" / "shard_2_of_2.lock"))
    twice = call(parts, *second)
    assert "shard 2/2 is running already" in twice.wait()[1]
    victims: list[psutil.Process] = []
    wait_for(lambda: bool(victims.extend(filter(None, [in_training(running, study)])) or victims))
    victims[0].send_signal(signal.SIGKILL)
    code, said = running.wait()
    assert code == 1 and "training ended by signal 9" in said and "vdr: starter/" in said
    assert beside.wait()[0] == 0
    code, said = call(parts, *first).wait()
    assert code == 0, said

    assert (study / "study.json").read_text() == (tmp_path / "whole" / "study" / "study.json").read_text()
    report_is_the_same_without_the_checkpoints(call, study)


def report_is_the_same_without_the_checkpoints(call: Any, study: Path) -> None:
    """study.json and the metrics are enough, bit for bit."""
    names = ("study.json", "study.md", "study.html")
    before = [(study / name).read_bytes() for name in names]
    for path in study.glob("runs/*/*/*/*"):
        if path.name != "metrics.jsonl":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in ("work", "starts"):
        shutil.rmtree(study / name)
    for name in names[1:]:
        (study / name).unlink()
    code, said = call("report", study).wait()
    assert code == 0, said
    assert [(study / name).read_bytes() for name in names] == before
