"""Runs that end with a budget of tokens or seconds."""

from __future__ import annotations

import json
from pathlib import Path


def test_a_budget_of_tokens_ends_the_run_also_in_two_pieces(train, read, tmp_path: Path) -> None:
    """20 completions of at most 7 tokens per step. The last step's completions are saved, token by token."""
    settings = {
        "train.steps": 99,
        "train.max_sampled_tokens": 400,
        "disagreement.mode": "per_token",
        "disagreement.members": 2,
        "observe.completions_every": 10,
    }
    ended = train(tmp_path / "whole", settings=settings)
    assert ended.returncode == 0, ended.stderr
    lines = read.metrics(tmp_path / "whole")
    assert 3 <= len(lines) <= 5 and lines[-2]["sampled_tokens"] < 400 <= lines[-1]["sampled_tokens"]
    assert [path.stem for path in (tmp_path / "whole" / "completions").iterdir()] == [f"step_{len(lines):06d}"]
    finished = json.loads((tmp_path / "whole" / "finished.json").read_text())
    assert finished["step"] == len(lines)

    train(tmp_path / "pieces", settings={**settings, "train.max_sampled_tokens": 200})
    ended = train(tmp_path / "pieces", "--resume", "auto", settings=settings)
    assert ended.returncode == 0, ended.stderr
    assert read.metrics(tmp_path / "pieces") == lines


def test_seconds_end_a_run_and_count_over_its_resumes(train, tmp_path: Path) -> None:
    """A step takes longer than a microsecond: one is enough, and a resumed run has none left."""
    settings = {"train.steps": 99, "train.max_seconds": 1e-6}
    for more in ((), ("--resume", "auto")):
        ended = train(tmp_path / "run", *more, settings=settings)
        assert ended.returncode == 0, ended.stderr
        assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
