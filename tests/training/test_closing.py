"""The last lines of a run name what it made, what improved and what comes next."""

from __future__ import annotations

import json
from pathlib import Path

from vdr_cli.config import Config
from vdr_cli.training.closing import closing_lines


def run_of(folder: Path, *lines: dict[str, float]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_held_out_numbers_come_before_the_reward(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"step": 0, "eval/pass@1": 0.2}, {"step": 9, "reward": 0.4, "eval/pass@1": 0.59})
    (run / "model").mkdir()
    (run / "report.html").touch()
    assert closing_lines(run, Config()) == [
        f"finished: model/ and report.html in {run}",
        "held-out pass@1 0.200 at step 0, 0.590 at step 9",
        f"next: vdr eval starter {run}; vdr score {run} --model {run}; vdr audit {run}",
    ]


def test_without_evaluations_the_reward_and_without_a_model_no_next(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"step": 1, "reward": 0.25}, {"step": 2, "reward": 0.5})
    assert closing_lines(run, Config()) == [
        f"finished: the last checkpoint in {run}",
        "reward 0.250 at step 1, 0.500 at step 2",
    ]
    assert closing_lines(run_of(tmp_path, {"step": 1, "reward": 0.25}), Config())[1:] == []


def test_early_warnings_are_repeated_with_their_steps(tmp_path: Path) -> None:
    values = {0: 0.9, 10: 0.5, 20: 0.4}
    lines = [{"step": step, "eval/pass@1": 0.2, "eval/pass@8": v, "eval/pass@8_high": v} for step, v in values.items()]
    (warning,) = [line for line in closing_lines(run_of(tmp_path, *lines), Config()) if "warned" in line]
    assert warning.startswith("warned at step 20: held-out pass@8 has fallen from 0.900 to 0.400")
