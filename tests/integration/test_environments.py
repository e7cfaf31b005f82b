"""Runs with an environment: faults planted one at a time, and a game that is killed in the middle and resumed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "programs" / "faulty_environment.py"
EPISODES = 2 * 4
"""Groups of a step times their size."""
GAMES = {"train.prompts_per_step": 2, "train.micro_batch_size": 4, "train.steps": 4, "train.checkpoint_every": 1}
FAULTS = {
    "reset raises": "reset raised on dataset row",
    "respond raises": "respond raised on dataset row",
    "respond counts": "respond returned int on dataset row",
    "respond hangs": "respond had not returned after 0.5 s on dataset row",
    "respond exits": "respond raised on dataset row",
}
"""A fault in a method, and the words of the line that reports it."""


@pytest.mark.parametrize(("fault", "ranks"), [(fault, 2 if fault == "respond raises" else 1) for fault in FAULTS])
def test_a_faulty_environment_ends_the_run_with_one_line_and_a_checkpoint(
    train, read, tmp_path: Path, fault: str, ranks: int
) -> None:
    """The first step goes well."""
    settings = {
        **GAMES,
        "rollout.environment": f"{PROGRAM}:Echo",
        "rollout.tool_timeout": 0.5,
        "rollout.episode_tokens": 20,
        "rewards.functions": [{"name": "length"}],
    }
    planted = {"FAULT": fault, "CALLS": str(3 * EPISODES // ranks), "CLOSED": str(tmp_path / "closed")}
    ended = train(tmp_path / "run", ranks=ranks, settings=settings, **planted)
    assert ended.returncode == 3, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("vdr")]
    assert line.startswith("vdr: error: rollout.environment ") and f":Echo: {FAULTS[fault]}" in line
    assert "Traceback" not in ended.stderr
    done = len(read.metrics(tmp_path / "run"))
    assert 1 <= done < 4 and (tmp_path / "run" / "checkpoints" / f"step_{done:06d}" / "manifest.json").is_file()
    assert len((tmp_path / "closed").read_text().splitlines()) == (done + 1) * EPISODES


def test_a_run_killed_in_the_middle_of_a_game_resumes_to_the_bit(train, read, tmp_path: Path) -> None:
    settings = {**GAMES, "model.name": "guess", "data.name": "guess", "rollout.environment": f"{PROGRAM}:Killed"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended = train(whole, settings=settings, FAULT="none", CALLS="0")
    assert ended.returncode == 0, ended.stderr
    # A game takes 3.6 guesses in the mean: the third step, and games that have begun.
    ended = train(killed, settings=settings, FAULT="guess dies", CALLS=str(9 * EPISODES))
    assert ended.returncode == -signal.SIGKILL
    assert len(read.metrics(killed)) == 2
    ended = train(killed, "--resume", "auto", settings=settings, FAULT="none", CALLS="0")
    assert ended.returncode == 0, ended.stderr
    assert read.metrics(killed) == read.metrics(whole)
    assert read.completions(killed)[-1].equals(read.completions(whole)[-1])
    kept = read.weights(whole)
    assert all(tensor.equal(kept[name]) for name, tensor in read.weights(killed).items())
