"""One real step of every recipe, on a tiny random model of its architecture and rows with its columns."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from vdr_cli import recipes
from vdr_cli.beds.registry import BEDS

pytestmark = pytest.mark.integration

SMALL = {
    "rollout.group_size": 2,
    "rollout.max_new_tokens": 4,
    "train.prompts_per_step": 2,
    "train.micro_batch_size": 2,
    "train.steps": 1,
    "train.warmup_steps": 0,
    "train.eval_every": 0,
    "train.keep_best": False,
    "train.eval_k": None,
    "disagreement.members": 2,
    "grpo.overlong_cache": 0,
    "launch.num_processes": None,
    "launch.hostfile": None,
    "launch.max_restarts": 0,
    "observe.tensorboard": False,
    "observe.report": False,
}


@pytest.mark.parametrize("name", [name for name in recipes.NAMES if name not in BEDS])
def test_one_step(name: str, forked, rows, tiny_qwen2: Path, tmp_path: Path) -> None:
    settings = dict(SMALL)
    if "scope: last_k" in recipes.recipe_text(name):
        settings["disagreement.last_k"] = 1
    if "math_verify" in recipes.recipe_text(name) and find_spec("math_verify") is None:
        settings["rewards.functions"] = [{"name": "exact_match"}]
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    run = tmp_path / "run"
    arguments = ["train", str(recipes.recipe_path(name)), "--model", str(tiny_qwen2), "--data", str(rows(name))]
    done = forked(*arguments, "--output", str(run), "--set", "data.subset=null", *overrides)
    assert done.returncode == 0, done.stderr
    (line,) = (run / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["disagreement/mean"] > 0
    assert (run / "model" / "config.json").is_file()
