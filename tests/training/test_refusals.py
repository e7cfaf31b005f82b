"""Updates with a gradient that is not finite: reported, and from a number on the end of the run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vdr_cli.config.load import load_config
from vdr_cli.errors import DataError
from vdr_cli.training.refusals import stop_if_refused_too_often


class State:
    """The loop's state, as far as refusals look at it."""

    step = 3

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.counted: list[list[bool]] = []

    def count_refusals(self, refused: list[bool]) -> int:
        self.counted.append(refused)
        return self.longest


def run(folder: Path, longest: int, refused: list[bool]) -> tuple[State, list[str]]:
    """The state after an update, and what was noted."""
    notes: list[str] = []
    config = load_config(overrides=["model.name=other", "train.max_refused_steps=2"])
    resources: Any = SimpleNamespace(config=config, directory=folder)
    log: Any = SimpleNamespace(note=notes.append)
    state: Any = State(longest)
    batch: Any = {"ids": torch.tensor([1, 2])}
    updates: Any = SimpleNamespace(refused=refused)
    stop_if_refused_too_often(resources, state, log, batch, "advantages", updates)  # type: ignore[arg-type]
    return state, notes


def test_an_update_that_was_made_is_not_mentioned(tmp_path: Path) -> None:
    state, notes = run(tmp_path, 0, [False, False])
    assert notes == [] and state.counted == [[False, False]] and list(tmp_path.iterdir()) == []


def test_one_refusal_is_noted(tmp_path: Path) -> None:
    _, notes = run(tmp_path, 1, [True, False])
    assert notes == ["step 3: the gradient was not finite; the update was refused on all ranks"]
    assert list(tmp_path.iterdir()) == []


def test_too_many_in_a_row_save_the_batch_and_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 steps in a row had a loss or gradient that is not finite") as error:
        run(tmp_path, 2, [True])
    (saved,) = tmp_path.iterdir()
    assert saved.name == "refused_batch_rank0.pt" and str(saved) in str(error.value)
    assert torch.load(saved)["batch"]["ids"].tolist() == [1, 2]


def test_a_full_disk_does_not_hide_why_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(DataError, match=r"2 steps in a row .* could not be saved \(unexpected pos 64 vs 0\)"):
        run(tmp_path, 2, [True])
