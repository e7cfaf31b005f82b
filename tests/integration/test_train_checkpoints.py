"""Checkpoints of real runs: disks that are full or read-only, kills at bad moments, the best one, torn ones."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vdr_cli.exploration.watch import EVIDENCE


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


PROGRAMS = Path(__file__).parent / "programs"
FILLING = (PROGRAMS / "filling.py").read_text(encoding="utf-8")


def on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Path, full: int, free: int
) -> tuple[Path, dict[str, object]]:
    """(run directory, settings) of a run whose disk is full between two of its steps."""
    (tmp_path / "mine.py").write_text(FILLING)
    settings = {
        "rewards.functions": [{"name": f"{tmp_path}/mine.py:filling"}],
        "train.checkpoint_every": 1,
        "train.steps": 5,
        "train.keep_last": 1,
    }
    for name, value in {"DISK": disk, "FULL": full, "FREE": free}.items():
        monkeypatch.setenv(name, str(value))
    return disk / "run", settings


def test_a_full_disk_costs_a_run_nothing_that_was_complete(
    train, read, small_disk: Path, tmp_path: Path, monkeypatch
) -> None:
    """Full from the third step to the fifth: checkpoints and completions of two steps are missing, nothing else."""
    run, settings = on_a_full_disk(tmp_path, monkeypatch, small_disk, 3, 5)
    ended = train(run, ranks=2, settings=settings)
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout
    assert "checkpoint under" in said and "the one before is intact; training continues" in said
    assert "completions cannot be written" in said
    assert [line["step"] for line in read.metrics(run)] == [1, 2, 3, 4, 5]
    assert [path.stem for path in sorted((run / "completions").iterdir())] == [f"step_00000{n}" for n in (1, 2, 5)]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000005"]


def test_a_disk_that_stays_full_ends_the_run_with_one_line(
    train, read, small_disk: Path, tmp_path: Path, monkeypatch
) -> None:
    run, settings = on_a_full_disk(tmp_path, monkeypatch, small_disk, 3, 99)
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


LOCKING = (PROGRAMS / "locking.py").read_text(encoding="utf-8")


@pytest.fixture
def lockable(tmp_path: Path, small_disk: Path) -> Iterator[tuple[Path, dict[str, object]]]:
    """(run directory, settings) of a run whose checkpoints directory becomes read-only. For root, who may mount."""
    (tmp_path / "mine.py").write_text(LOCKING)
    settings = {"rewards.functions": [{"name": f"{tmp_path}/mine.py:locking"}], "train.keep_last": 1}
    yield tmp_path / "run", {**settings, "train.checkpoint_every": 1, "train.steps": 5}
    subprocess.run(["umount", "--lazy", tmp_path / "run" / "checkpoints"], check=False, capture_output=True)


def lock(monkeypatch: pytest.MonkeyPatch, run: Path, locked: int, opened: int) -> None:
    for name, value in (("FOLDER", run / "checkpoints"), ("LOCKED", locked), ("OPEN", opened)):
        monkeypatch.setenv(name, str(value))


def test_a_read_only_directory_costs_checkpoints_and_nothing_else(train, read, lockable, monkeypatch) -> None:
    run, settings = lockable
    lock(monkeypatch, run, 3, 5)
    ended = train(run, ranks=2, settings=settings)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Read-only file system") == 2
    assert "the one before is intact; training continues" in ended.stdout
    assert [line["step"] for line in read.metrics(run)] == [1, 2, 3, 4, 5]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000005"]


def test_a_directory_that_stays_read_only_ends_the_run_with_one_line(train, read, lockable, monkeypatch) -> None:
    run, settings = lockable
    lock(monkeypatch, run, 3, 99)
    ended = train(run, settings=settings)
    assert ended.returncode == 4
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("vdr")]
    assert line.startswith("vdr: error: checkpoint under") and "Read-only file system" in line
    assert "Traceback" not in ended.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000002"]
    subprocess.run(["umount", run / "checkpoints"], check=True)
    lock(monkeypatch, run, 99, 99)
    ended = train(run, "--resume", "auto", settings=settings)
    assert ended.returncode == 0, ended.stderr
    assert [line["step"] for line in read.metrics(run)] == [1, 2, 3, 4, 5]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000005"]


BETWEEN_STEPS = (PROGRAMS / "between_steps.py").read_text(encoding="utf-8")


def test_a_kill_among_four_ranks_that_divide_rows_costs_nothing(train, read, tmp_path: Path, monkeypatch) -> None:
    """ZeRO-3, pairs of ranks, adapters, members, a reference. The last step is resumed without division too."""
    (tmp_path / "mine.py").write_text(BETWEEN_STEPS)
    settings = {"rewards.functions": [{"name": f"{tmp_path}/mine.py:countdown"}], "engine.sequence_parallel": 2}
    settings |= {"model.lora": {"rank": 4, "alpha": 8}, "grpo.beta": 0.1, "disagreement.mode": "per_token"}
    settings |= {"disagreement.members": 2, "train.prompts_per_step": 4, "train.steps": 2, "train.checkpoint_every": 1}
    run, whole, undivided = (tmp_path / name for name in ("run", "whole", "undivided"))
    assert train(whole, ranks=4, settings=settings).returncode == 0
    monkeypatch.setenv("KILL_BEFORE", "2")
    assert train(run, ranks=4, settings=settings).returncode in (4, -signal.SIGKILL)
    monkeypatch.delenv("KILL_BEFORE")
    shutil.copytree(run, undivided)
    ended = train(run, "--resume", "auto", ranks=4, settings=settings)
    assert ended.returncode == 0, ended.stderr
    lines = read.metrics(whole)
    assert read.metrics(run) == lines and lines[-1]["disagreement/mean"] > 0 and lines[-1]["kl"] > 0
    assert_equal(read.weights(run), read.weights(whole), exact=True)
    ended = train(undivided, "--resume", "auto", ranks=4, settings=settings | {"engine.sequence_parallel": 1})
    assert ended.returncode == 0, ended.stderr
    first, last = read.metrics(undivided)
    assert first == lines[0] and last != lines[1]
    for name in ("loss", "grad_norm", "kl", "disagreement/mean"):
        assert last[name] == pytest.approx(lines[1][name], rel=1e-4, abs=1e-6), name
    assert_equal(read.weights(undivided), read.weights(whole), exact=False)


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], exact: bool) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5)


def test_a_kill_between_two_steps_on_one_rollout_costs_nothing(train, read, tmp_path: Path, monkeypatch) -> None:
    """The fourth of six optimizer steps: the second on its rollout, its gradient accumulated, the third one done."""
    (tmp_path / "mine.py").write_text(BETWEEN_STEPS)
    settings = {"rewards.functions": [{"name": f"{tmp_path}/mine.py:countdown"}], "grpo.num_iterations": 2}
    settings |= {"train.micro_batch_size": 3, "train.checkpoint_every": 2, "train.steps": 6}
    assert train(tmp_path / "whole", ranks=2, settings=settings).returncode == 0
    monkeypatch.setenv("KILL_BEFORE", "4")
    assert train(tmp_path / "run", ranks=2, settings=settings).returncode in (4, -signal.SIGKILL)
    assert [line["step"] for line in read.metrics(tmp_path / "run")] == [2]
    monkeypatch.delenv("KILL_BEFORE")
    ended = train(tmp_path / "run", "--resume", "auto", ranks=2, settings=settings)
    assert ended.returncode == 0, ended.stderr
    assert read.metrics(tmp_path / "run") == read.metrics(tmp_path / "whole")
    for ours, theirs in zip(*map(read.completions, (tmp_path / "run", tmp_path / "whole")), strict=True):
        assert ours.equals(theirs)
    expected = read.weights(tmp_path / "whole")
    assert all((tensor == expected[name]).all() for name, tensor in read.weights(tmp_path / "run").items())


SOLVING = (PROGRAMS / "solving.py").read_text(encoding="utf-8")


def test_the_best_checkpoint_stays_beside_the_last(train, read, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("METRICS", str(tmp_path / "run" / "metrics.jsonl"))
    (tmp_path / "mine.py").write_text(SOLVING)
    for name, held_out in (("rows", False), ("held_out", True)):
        rows = [json.dumps({"prompt": f"{n},2,3=6:", "held_out": held_out}) for n in range(1, 6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    settings = {
        "data.name": str(tmp_path / "rows.jsonl"),
        "data.eval_name": str(tmp_path / "held_out.jsonl"),
        "rewards.functions": [{"name": f"{tmp_path}/mine.py:solving"}],
        "train.eval_every": 1,
        "train.keep_best": True,
        "train.eval_k": [4, 8],  # the best is the one with the best pass@1 all the same
        "train.keep_last": 1,
        "train.checkpoint_every": 1,
    }
    for steps, more in ((5, ()), (7, ("--resume", "auto"))):
        ended = train(tmp_path / "run", *more, settings={**settings, "train.steps": steps})
        assert ended.returncode == 0, ended.stderr
        kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
        assert kept == ["step_000003", f"step_{steps:06d}"]
    assert [line["eval/pass@1"] for line in read.metrics(tmp_path / "run")] == [0, 0, 0, 1, 0, 0, 0, 0]


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
    assert "step_000001" in ended.stdout and EVIDENCE not in ended.stdout


def test_a_run_is_not_resumed_on_other_rows(train, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [json.dumps({"prompt": f"{n} 1 1={n + 2}:", "answer": f"{n}+1+1"}) + "\n" for n in range(1, 8)]
    data.write_text("".join(rows))
    settings = {"data.name": str(data), "rewards.functions": [{"name": "exact_match"}], "train.steps": 1}
    assert train(tmp_path / "run", settings=settings).returncode == 0
    data.write_text("".join(rows[::-1]))
    ended = train(tmp_path / "run", "--resume", "auto", settings=settings | {"train.steps": 2})
    assert ended.returncode == 2
    assert f"data.name {data} has changed since (other rows, or another order)" in ended.stderr
    data.write_text("".join(rows))
    assert train(tmp_path / "run", "--resume", "auto", settings=settings | {"train.steps": 2}).returncode == 0
