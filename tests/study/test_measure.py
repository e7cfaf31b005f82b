"""The counts of one model: what `vdr eval` finds, a number a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vdr_cli.config.load import validate
from vdr_cli.evaluation.evaluate import run_eval
from vdr_cli.evaluation.request import EvalRequest
from vdr_cli.study.measure import fingerprint, main


@pytest.fixture
def request_file(tmp_path: Path) -> Path:
    config = validate({"model": {"name": "starter"}, "data": {"name": "starter"}})
    request: dict[str, Any] = {
        "model": "starter",
        "output": str(tmp_path / "deep" / "evaluation.json"),
        "settings": config.model_dump(mode="json", include={"model", "data", "rewards", "rollout"}),
        "prompts": 3,
        "samples": 16,
        "seed": 5,
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    return tmp_path / "request.json"


def test_the_counts_are_those_of_an_evaluation(request_file: Path) -> None:
    request = json.loads(request_file.read_text())
    assert main(str(request_file)) == 0
    counts = json.loads(Path(request["output"]).read_text())
    config = validate(request["settings"])
    (result,) = run_eval(
        EvalRequest(("starter",), config.data, config.rewards, config.rollout, samples=16, prompts=3, seed=5)
    )
    assert counts["solved"] == result.solved.sum(1).tolist() and 0 < sum(counts["solved"]) < 48
    assert counts["classes"] == [len(found) for found in result.solutions()]
    assert counts["reward"] == pytest.approx(result.task_reward.mean(1))
    assert counts["rows"] == [0, 1, 2] and counts["samples"] == 16
    assert counts["request"] == fingerprint(request)
    assert np.isfinite(result.entropy_sum).all()


def test_what_cannot_be_measured_is_one_line(request_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = json.loads(request_file.read_text())
    request_file.write_text(json.dumps({**request, "model": "./nowhere"}))
    assert main(str(request_file)) == 2
    assert capsys.readouterr().err.startswith("vdr: error: model ./nowhere: no such directory")
    assert not Path(request["output"]).exists()
