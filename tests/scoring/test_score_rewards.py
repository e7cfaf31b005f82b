"""Rewards beside the scores: `vdr score --reward`."""

import json

import pytest

from tests.tiny import character_tokenizer, tiny_qwen2_config
from vdr_cli.cli import app
from vdr_cli.config import RewardsConfig
from vdr_cli.errors import ConfigError, DataError
from vdr_cli.scoring.request import Fields, ScoreRequest
from vdr_cli.scoring.score import run_score

ROWS = [
    {"prompt": "1 2 3=6:", "completion": "1+2+3", "numbers": [1, 2, 3], "target": 6},
    {"prompt": "1 2 3=6:", "completion": "1+1+1", "numbers": [1, 2, 3], "target": 6},
    {"prompt": "9 8 2=74:", "completion": "9*8+2", "numbers": [9, 8, 2], "target": 74},
]


def score(tmp_path, functions, rows=ROWS, resume=False, **fields):
    path = tmp_path / "in.jsonl"
    if not resume:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = RewardsConfig.model_validate({"functions": functions})
    out, named = str(tmp_path / "out.jsonl"), Fields(**fields)
    request = ScoreRequest((str(path),), "starter", out, None, rewards, fields=named, resume=resume)
    result = run_score(request)
    return result, [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_rows_get_each_reward_and_their_weighted_sum_by_which_they_are_ranked(tmp_path):
    result, rows = score(tmp_path, [{"name": "countdown"}, {"name": "length", "weight": 0.1}], label="reward")
    assert [row["rewards/countdown"] for row in rows] == [1.0, 0.0, 1.0]
    assert [row["rewards/length"] for row in rows] == [5.0, 5.0, 5.0]
    assert [row["reward"] for row in rows] == pytest.approx([1.5, 0.5, 1.5])
    assert [row["completion"] for row in rows] == [row["completion"] for row in ROWS] and rows[0]["nll_sum"] > 0
    assert {row["measure"] for row in result.ranking} >= {"nll_sum", "entropy_mean"}


def test_a_reward_model_judges_rows(tmp_path):
    from transformers import AutoModelForSequenceClassification

    from vdr_cli.rewards.model import RewardModel

    folder = tmp_path / "judge"
    tokenizer = character_tokenizer()
    AutoModelForSequenceClassification.from_config(tiny_qwen2_config(tokenizer, num_labels=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _, rows = score(tmp_path, [{"name": f"model:{folder}"}])
    expected = RewardModel(str(folder))([row["prompt"] for row in ROWS], [row["completion"] for row in ROWS])
    assert [row["rewards/judge"] for row in rows] == pytest.approx(expected, abs=1e-5)


def test_a_missing_column_and_a_wrong_name_are_one_line(tmp_path, capsys):
    with pytest.raises(DataError, match="reward exact_match needs the column answer"):
        score(tmp_path, [{"name": "exact_match"}])
    path = tmp_path / "in.jsonl"
    assert (
        app.run(["score", str(path), "--model", "starter", "--reward", "lenght", "--members", "0"])
        == ConfigError.exit_code
    )
    assert "did you mean length?" in capsys.readouterr().err


def test_a_reward_file_that_changed_is_asked_again(tmp_path):
    import sys

    file = tmp_path / "rw.py"
    results = []
    for value in (1.0, 2.5):
        file.write_text(f"def f(completions, **columns):\n    return [{value}] * len(completions)\n")
        result, rows = score(tmp_path, [{"name": f"{file}:f"}], resume=bool(results))
        results.append((result.is_reused, rows[0]["reward"]))
        for name in [name for name in sys.modules if "user_files.rw_" in name]:  # as in a process of its own
            del sys.modules[name]
    assert results == [(False, 1.0), (False, 2.5)]
    assert score(tmp_path, [{"name": f"{file}:f"}], resume=True)[0].is_reused
