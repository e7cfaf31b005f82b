"""Checkpoints of a real engine in one process: complete or absent, and never loaded when anything in them is wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from vdr_cli.engine import checkpoint as checkpoints
from vdr_cli.engine.engine import Engine
from vdr_cli.errors import ConfigError, MachineError

Build = Callable[..., Engine]


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once by `written`, copied for every test: a folder with step_000001 and step_000002."""
    return tmp_path_factory.mktemp("complete") / "checkpoints"


@pytest.fixture
def written(build: Build, complete: Path, tmp_path: Path) -> Path:
    if not complete.exists():
        engine = build(3)
        for step in (1, 2):
            checkpoints.save(engine, complete, step, {"loop": {"step": step}})
    return Path(shutil.copytree(complete, tmp_path / "checkpoints"))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "step_000002").rglob("*") if path.is_file())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path, at: int = -2) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def flip_the_middle(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [truncate, empty, flip, flip_the_middle, Path.unlink])
def test_damage_to_any_file_is_reported_and_the_one_before_is_used(written: Path, damage) -> None:
    for number, name in enumerate(path.relative_to(written) for path in files_of(written)):
        folder = Path(shutil.copytree(written, written.with_name(f"damaged_{number}")))
        damage(folder / name)
        found, passed_over = checkpoints.newest_complete(folder)
        assert found is not None and found.path == folder / "step_000001", name
        (line,) = passed_over
        assert "step_000002 passed over: " in line
        assert name.name in line or name.name == "manifest.json", (name, line)
        with pytest.raises(ConfigError, match=f"--resume {folder / 'step_000002'}: "):
            checkpoints.open_checkpoint(folder / "step_000002")


def test_each_rank_reads_its_share_of_the_bytes(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If one rank read all of a large checkpoint, the others' collective would time out."""
    folder = written / "step_000002"
    monkeypatch.setattr(checkpoints.collectives, "world_size", lambda: 3)
    read: list[Path] = []
    monkeypatch.setattr(checkpoints, "_sha256", lambda path: read.append(path) or "another")
    for rank in range(3):
        monkeypatch.setattr(checkpoints.collectives, "rank", lambda rank=rank: rank)
        found = checkpoints._damage(folder)
        assert found is not None and found.endswith("does not match its checksum")
    assert len(read) == len(set(read)) == 3
    assert checkpoints._damage(folder / "elsewhere") is None, "load says that the hosts do not share the directory"


def test_a_byte_of_the_manifest_is_noticed_wherever_it_is(written: Path) -> None:
    """Also one that turns the name of a file into the name of another, so that one of them is never looked at."""
    manifest = written / "step_000002" / "manifest.json"
    content = manifest.read_bytes()
    for at in range(len(content)):
        manifest.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert checkpoints.find_fault(manifest.parent) is not None, content[max(0, at - 20) : at + 20]
    names = json.loads(content)["files"]
    (manifest.parent / "rank_00001.pt").write_bytes(b"of another run")
    assert "rank_00001.pt" not in names
    manifest.write_bytes(content)
    assert checkpoints.find_fault(manifest.parent) == "rank_00001.pt is not in manifest.json"


def test_what_a_conversion_left_makes_no_checkpoint_faulty(written: Path) -> None:
    """DeepSpeed's converter writes into the checkpoint; a run that ended during it must find the checkpoint again."""
    folder = written / "step_000002"
    (folder / "universal" / "zero").mkdir(parents=True)
    (folder / "universal" / "zero" / "fp32.pt").write_bytes(b"half of it")
    (folder / "latest_universal").write_text("universal")
    assert checkpoints.find_fault(folder) is None


def test_hidden_files_of_a_file_manager_or_nfs_make_no_checkpoint_faulty(written: Path) -> None:
    folder = written / "step_000002"
    for name in (".DS_Store", "engine/.nfs0000000000a1b2c3"):
        (folder / name).write_bytes(b"not ours")
    assert checkpoints.find_fault(folder) is None


def test_files_that_a_user_put_there_make_no_checkpoint_faulty(written: Path) -> None:
    """zero_to_fp32.py of DeepSpeed lies in a checkpoint, and people run it there."""
    folder = written / "step_000002"
    for name in ("pytorch_model.bin", "notes.txt", "fp32/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not ours")
    assert checkpoints.find_fault(folder) is None
    (folder / "reference.safetensors").write_bytes(b"would be loaded")
    assert checkpoints.find_fault(folder) == "reference.safetensors is not in manifest.json"


def test_nothing_complete_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert checkpoints.newest_complete(tmp_path / "none") == (None, [])
    (tmp_path / "step_000001").mkdir()
    (tmp_path / ".partial_step_000002").mkdir()
    found, (line,) = checkpoints.newest_complete(tmp_path)
    assert found is None and "step_000001 passed over: manifest.json cannot be read" in line


def test_steps_are_ordered_as_numbers(written: Path) -> None:
    shutil.copytree(written / "step_000001", written / "step_1000000")
    shutil.copytree(written / "step_000001", written / "step_000003.bak")
    found, _ = checkpoints.newest_complete(written)
    assert found is not None and found.path.name == "step_1000000"


def test_the_newest_and_the_best_are_kept(written: Path) -> None:
    for step in (3, 4, 5):
        shutil.copytree(written / "step_000001", written / f"step_{step:06d}")
    checkpoints.prune(written, keep_last=2, keep=written / "step_000001")
    assert sorted(path.name for path in written.iterdir()) == ["step_000001", "step_000004", "step_000005"]


def test_later_steps_do_not_come_back_after_going_on_from_an_earlier_one(build: Build, written: Path) -> None:
    checkpoints.set_aside(written, after=1)
    found, passed_over = checkpoints.newest_complete(written)
    assert found is not None and found.path.name == "step_000001" and not passed_over
    checkpoints.save(build(3), written, 2, {})
    checkpoints.prune(written, keep_last=1)
    assert [path.name for path in written.iterdir()] == ["step_000002"]


@pytest.mark.parametrize("what", ["shard", "random states", "more", "safetensors", "manifest"])
def test_a_write_that_fails_leaves_what_was_there_and_an_engine_that_can_go_on(
    build: Build, completions, one_step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    engine, folder = build(3), tmp_path / "checkpoints"
    checkpoints.save(engine, folder, 1, {})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def full_for_safetensors(*_: object) -> None:
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as disk:
        if what == "shard":
            disk.setattr(engine.ds_engine.checkpoint_engine, "save", full)
        elif what == "random states":
            disk.setattr(checkpoints, "_random_states", full)
        elif what in ("more", "safetensors"):
            pass
        else:
            disk.setattr(checkpoints, "_publish", full)
        with pytest.raises(MachineError, match=r"checkpoint under .* No space left on device \(\d+ MiB free"):
            more = {"more": [full], "safetensors": [full_for_safetensors]}.get(what, [])
            checkpoints.save(engine, folder, 2, {}, more)
    assert [path.name for path in folder.iterdir()] == ["step_000001"]
    assert checkpoints.find_fault(folder / "step_000001") is None
    assert not one_step(engine, completions)[1].refused
    checkpoints.save(engine, folder, 2, {})
    assert checkpoints.find_fault(folder / "step_000002") is None


def test_a_rank_that_does_not_see_the_files_does_not_go_on_without_them(build: Build, written: Path) -> None:
    found, _ = checkpoints.newest_complete(written)
    assert found is not None
    next((found.path / "engine").glob("*optim_states.pt")).unlink()
    with pytest.raises(MachineError, match=r"optim_states.pt is missing; all hosts must share the directory"):
        checkpoints.load(build(3), found)


def test_a_checkpoint_on_a_read_only_disk_is_loaded(
    build: Build, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    found, _ = checkpoints.newest_complete(written)
    assert found is not None
    for name in ("unlink", "rmdir", "open"):
        monkeypatch.setattr(os, name, refused)
    monkeypatch.setattr(Path, "unlink", refused)
    checkpoints.load(build(3), found)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weights_and_moments_come_back_bit_for_bit(build: Build, completions, one_step, tmp_path: Path, stage) -> None:
    """Two engines that go on alike have the same masters and moments; a third one without them does not."""
    engine, other, fresh = build(stage), build(stage), build(stage)
    for _ in range(2):
        one_step(engine, completions)
    checkpoints.save(engine, tmp_path / "checkpoints", 2, {"loop": {}})
    found, _ = checkpoints.newest_complete(tmp_path / "checkpoints")
    assert found is not None
    torch.manual_seed(5)
    checkpoints.load(other, found)
    expected = one_step(engine, completions)
    assert all(map(torch.equal, weights_of(engine), weights_of(other))) is False
    logps, result = one_step(other, completions)
    assert torch.equal(logps, expected[0]) and result == expected[1]
    assert all(map(torch.equal, weights_of(engine), weights_of(other)))
    one_step(fresh, completions)
    assert not all(map(torch.equal, weights_of(engine), weights_of(fresh)))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_another_runs_checkpoint_does_not_bring_its_optimizers_settings(
    build: Build, completions, one_step, tmp_path: Path, stage
) -> None:
    """config.yaml says what the run computes; DeepSpeed restores whole parameter groups."""
    engine = build(stage)
    one_step(engine, completions)
    checkpoints.save(engine, tmp_path / "checkpoints", 1, {"loop": {}})
    found, _ = checkpoints.newest_complete(tmp_path / "checkpoints")
    assert found is not None
    other = build(stage, train={"adam_betas": (0.5, 0.6), "adam_epsilon": 1e-3})
    checkpoints.load(other, found)
    one_step(other, completions)
    groups = other.ds_engine.optimizer.param_groups
    assert {(tuple(group["betas"]), group["eps"]) for group in groups} == {((0.5, 0.6), 1e-3)}
    one_step(engine, completions)
    assert not all(map(torch.equal, weights_of(engine), weights_of(other)))


def test_random_states_go_on_where_they_were(build: Build, tmp_path: Path) -> None:
    """Reward functions draw from these."""

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    engine = build(3)
    checkpoints.save(engine, tmp_path / "checkpoints", 1, {"loop": {}})
    found, _ = checkpoints.newest_complete(tmp_path / "checkpoints")
    assert found is not None
    expected = draw()
    draw()
    checkpoints.load(engine, found)
    assert draw() == expected


def weights_of(engine: Engine) -> list[torch.Tensor]:
    with engine.gathered_model() as model:
        return [parameter.clone() for parameter in model.parameters()]
