"""The environment class of the game in TRL's trainer, as it is."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("trl")
SCRIPT = Path(__file__).parents[2] / "scripts" / "verify" / "guess_in_trl.py"


def test_trl_plays_the_same_game(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    spec = importlib.util.spec_from_file_location("guess_in_trl", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    trainer = script.trainer_of(steps=1, output=tmp_path, prompts=2, group_size=8)
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "reward" in line]
    assert line["rewards/Guess/mean"] == line["reward"] < 1.0
    assert line["tools/call_frequency"] > 2.0 and line["tools/failure_frequency"] == 0.0
