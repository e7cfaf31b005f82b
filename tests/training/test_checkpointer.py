"""A run's saves, those that fail, and the checkpoints that it may go on from."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vdr_cli.config.load import computed_settings, load_config
from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.exploration.sources import SOURCES
from vdr_cli.training import checkpointer as module
from vdr_cli.training.checkpointer import MEMORY, Checkpointer, refuse_other_run
from vdr_cli.training.state import LoopState


def test_each_part_of_a_checkpoint_is_written_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full for one part must not leave a rank behind in the collectives of the next."""
    written: list[str] = []
    monkeypatch.setattr(module.checkpoints, "prune", lambda *_: None)
    monkeypatch.setattr(module.checkpoints, "save", lambda *given: [write(tmp_path) for write in given[4]])
    monkeypatch.setattr(module.pending_rollout, "save", lambda pending, folder: written.append(pending))
    state = at_step(4)
    state.memory, state.pending = SimpleNamespace(state_dict=lambda: {"seen": 3}), "pending"  # type: ignore[assignment]
    Checkpointer(resources(tmp_path), print).save(state)
    assert torch.load(tmp_path / MEMORY) == {"seen": 3} and written == ["pending"]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls of engine/checkpoint.py, in order."""
    seen: list[tuple[Any, ...]] = []

    def save(engine: Any, folder: Path, step: int, content: dict[str, Any], also: Any) -> None:
        seen.append(("save", step, content))

    monkeypatch.setattr(module.checkpoints, "save", save)
    monkeypatch.setattr(module.checkpoints, "load", lambda engine, found: seen.append(("load", found.path)))
    monkeypatch.setattr(module.checkpoints, "prune", lambda folder, last, best: seen.append(("prune", last, best)))
    monkeypatch.setattr(module.checkpoints, "set_aside", lambda folder, after: seen.append(("aside", after)))
    monkeypatch.setattr(module.pending_rollout, "load", lambda *_: None)
    return seen


def resources(folder: Path, *overrides: str) -> Any:
    config = load_config(overrides=["model.name=other", "train.steps=9", *overrides])
    prompts = SimpleNamespace(digest="rows")
    parts = dict.fromkeys(("engine", "reference", "rewards", "prompt_at", "source"))
    return SimpleNamespace(
        config=config, directory=folder, prompts=prompts, tokenizer=SimpleNamespace(pad_token_id=0), **parts
    )


def at_step(step: int) -> LoopState:
    state = LoopState()
    state.step = step
    return state


def test_a_step_is_saved_once(events: list[tuple[Any, ...]], tmp_path: Path) -> None:
    res = resources(tmp_path, "train.keep_last=3")
    checkpointer, state = Checkpointer(res, print), at_step(4)
    checkpointer.save(state)
    checkpointer.save(state)
    (name, step, content), pruned = events
    assert (name, step) == ("save", 4) and pruned == ("prune", 3, None)
    settings = computed_settings(res.config)
    assert content == {"loop": state.saved(), "settings": settings, "source": "disagreement", "data": "rows"}


def test_the_best_checkpoint_is_kept(events: list[tuple[Any, ...]], tmp_path: Path) -> None:
    checkpointer = Checkpointer(resources(tmp_path, "train.keep_best=true", "train.eval_every=1"), print)
    state = at_step(4)
    state.remember_best(0.5)
    assert checkpointer.best_is_new(state)
    state.step = 5
    assert not checkpointer.best_is_new(state)
    checkpointer.save(state)
    assert events[-1] == ("prune", 2, tmp_path / "checkpoints" / "step_000004")
    state.step = state.best_step = 9
    assert not checkpointer.best_is_new(state), "at the end one is written anyway"


def test_a_checkpoint_that_cannot_be_written_is_a_warning(
    events: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MachineError("disk full")

    notes: list[str] = []
    monkeypatch.setattr(module.checkpoints, "save", full)
    checkpointer = Checkpointer(resources(tmp_path), notes.append)
    checkpointer.save_if_possible(at_step(4))
    assert notes == ["disk full; training continues"] and events == []
    with pytest.raises(MachineError):
        checkpointer.save(at_step(4))


def found(path: Path, step: int, data: str) -> Any:
    return SimpleNamespace(path=path, state={"loop": at_step(step).saved(), "data": data})


def test_a_run_goes_on_where_its_checkpoint_was(events: list[tuple[Any, ...]], tmp_path: Path) -> None:
    notes: list[str] = []
    path = tmp_path / "checkpoints" / "step_000004"
    checkpointer = Checkpointer(resources(tmp_path), notes.append)
    state = checkpointer.restore(found(path, 4, "rows"))
    assert state.step == 4 and notes == [f"resumed from {path}"]
    assert events == [("load", path), ("aside", 4)]
    checkpointer.save(state)
    assert events[2:] == [], "it is there already"


def test_a_run_from_its_start_sets_all_checkpoints_aside(events: list[tuple[Any, ...]], tmp_path: Path) -> None:
    assert Checkpointer(resources(tmp_path), print).restore(None).step == 0
    assert events == [("aside", -1)]


def test_another_runs_checkpoint_is_written_again_here(events: list[tuple[Any, ...]], tmp_path: Path) -> None:
    checkpointer = Checkpointer(resources(tmp_path), lambda _: None)
    checkpointer.save(checkpointer.restore(found(tmp_path / "other" / "step_000004", 4, "rows")))
    assert [event[0] for event in events] == ["load", "aside", "save", "prune"]


def test_changed_data_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step_000004"
    with pytest.raises(ConfigError, match=r"--resume .*step_000004: data.name starter has changed since"):
        refuse_other_run(found(path, 4, "other rows"), resources(tmp_path).config, "rows", tmp_path)


def test_a_checkpoint_beyond_the_last_step_is_refused(tmp_path: Path) -> None:
    """The run would end at once, with a model of more steps than were asked for."""
    checkpoint = found(tmp_path / "step_000004", 4, "rows")
    refuse_other_run(checkpoint, resources(tmp_path, "train.steps=4").config, "rows", tmp_path)
    with pytest.raises(ConfigError, match=r"train.steps 3: .*step_000004 has done 4 steps already"):
        refuse_other_run(checkpoint, resources(tmp_path, "train.steps=3").config, "rows", tmp_path)


def test_another_zero_stage_is_refused(tmp_path: Path) -> None:
    """The JSON may be edited under the same name: DeepSpeed would look for files of the other stage."""
    checkpoint = found(tmp_path / "step_000004", 4, "rows")
    checkpoint.state["zero_stage"] = 3
    refuse_other_run(checkpoint, resources(tmp_path, "engine.ds_config=zero3_hpz").config, "rows", tmp_path)
    with pytest.raises(ConfigError, match=r"engine\.ds_config zero2 has ZeRO stage 2, the checkpoint stage 3"):
        refuse_other_run(checkpoint, resources(tmp_path, "engine.ds_config=zero2").config, "rows", tmp_path)


def test_a_checkpoint_knows_the_settings_that_its_run_may_not_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands in config.yaml by now. A new version's new settings have their defaults."""
    monkeypatch.chdir(tmp_path)
    checkpoint = found(Path("checkpoints/step_000004"), 4, "rows")
    checkpoint.state["settings"] = computed_settings(resources(tmp_path).config)
    del checkpoint.state["settings"]["train"]["max_grad_norm"]

    def resumed(*overrides: str, directory: Path = tmp_path) -> None:
        refuse_other_run(checkpoint, resources(tmp_path, *overrides).config, "rows", directory)

    resumed("train.steps=20", "train.checkpoint_every=3", "observe.report=false")
    resumed("train.learning_rate=0.5", directory=tmp_path / "another run's")
    with pytest.raises(ConfigError, match=r"step_000004: grpo.loss, train.learning_rate differ in what it was written"):
        resumed("train.learning_rate=0.5", "grpo.loss=dr_grpo")
    del checkpoint.state["settings"]
    resumed("train.learning_rate=0.5")  # written by an earlier version


@pytest.mark.parametrize(
    "other",
    ["model.name=countdown4", "model.lora={rank: 4}", "train.weight_decay=0.1", "train.optimizer=muon"],
)
def test_a_checkpoint_without_its_run_still_knows_its_model(other: str, tmp_path: Path) -> None:
    """It may have been copied away: the weights of one model would go out under another's tokenizer."""
    checkpoint = found(tmp_path / "copied" / "step_000004", 4, "rows")
    checkpoint.state["settings"] = computed_settings(resources(tmp_path).config)
    moved = json.loads(json.dumps(checkpoint.state["settings"]))
    refuse_other_run(checkpoint, resources(tmp_path, "train.adam_epsilon=0.1").config, "rows", tmp_path / "new")
    more = ["train.muon_learning_rate=0.01"] if "muon" in other else []
    given = resources(tmp_path, other, *more).config
    with pytest.raises(ConfigError, match=rf"step_000004: {other.partition('=')[0]}.* in what it was written with"):
        refuse_other_run(checkpoint, given, "rows", tmp_path / "new")
    moved["model"]["name"] = "/elsewhere/other"  # with its directory
    checkpoint.state["settings"] = moved
    refuse_other_run(checkpoint, resources(tmp_path).config, "rows", tmp_path / "new")


def test_what_another_source_remembers_is_not_ours(events: list[tuple[Any, ...]], tmp_path: Path) -> None:
    path = tmp_path / "other" / "step_000004"
    path.mkdir(parents=True)
    visits = SOURCES["counts"].memory(load_config())
    assert visits is not None
    visits.take([7])
    visits.commit()
    torch.save(visits.state_dict(), path / MEMORY)
    checkpoint = found(path, 4, "rows")
    for theirs, ours, known in (("counts", "counts", True), ("value_heads", "counts", False)):
        res = resources(tmp_path, f"bonus.source={ours}")
        res.source = SOURCES[ours]
        checkpoint.state["source"] = theirs
        memory = Checkpointer(res, print).restore(checkpoint).memory
        assert memory is not None and (len(memory.state_dict()["keys"]) == 1) is known
