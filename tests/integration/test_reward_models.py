"""Reward models in real runs: whole or sharded over two ranks, resumed, and in `vdr eval` and `vdr audit`."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.tiny import character_tokenizer, tiny_qwen2_config

SHARDS_ALL = """
import os

from vdr_cli.engine import reward_models
from vdr_cli.models import placement

if "SHARDED" in os.environ:
    placement.SMALL = 0.0
seen = []
held = reward_models.sharded_like


def noticed(*arguments):
    print("sharded the reward model")
    return held(*arguments)


reward_models.sharded_like = noticed


def nothing(completions, **_):
    return [0.0] * len(completions)
"""


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A tiny reward model, and a reward function that makes every model count as large where SHARDED is set."""
    path = tmp_path_factory.mktemp("judge")
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(tiny_qwen2_config(tokenizer, num_labels=1)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "sharding.py").write_text(SHARDS_ALL)
    return path


def test_a_sharded_model_judges_as_a_whole_one_and_resumes(train, read, forked, judge, tmp_path):
    functions = [{"name": f"model:{judge}"}, {"name": f"{judge}/sharding.py:nothing"}]
    settings = {"rewards.functions": functions, "train.eval_every": 2, "train.eval_prompts": 4, "train.eval_samples": 2}
    settings |= {"train.keep_best": False, "train.eval_k": None, "disagreement.mode": "none", "observe.audit_every": 1}
    whole = train(tmp_path / "whole", settings=settings, ranks=2)
    assert whole.returncode == 0, whole.stderr
    first = train(tmp_path / "sharded", settings={**settings, "train.steps": 1}, ranks=2, SHARDED="1")
    assert first.returncode == 0, first.stderr
    rest = train(tmp_path / "sharded", "--resume", "auto", settings=settings, ranks=2, SHARDED="1")
    assert rest.returncode == 0, rest.stderr
    assert ["sharded the reward model" in run.stdout for run in (whole, first, rest)] == [False, True, True]

    ours, theirs = read.metrics(tmp_path / "whole"), read.metrics(tmp_path / "sharded")
    named = [[line[f"rewards/{judge.name}/mean"] for line in lines if "reward" in line] for lines in (ours, theirs)]
    assert len(named[0]) == 2 and named[0] == pytest.approx(named[1], abs=1e-6)
    assert ours[-1]["eval/reward"] == pytest.approx(theirs[-1]["eval/reward"], abs=1e-6)

    numbers = tmp_path / "eval.json"
    arguments = "--samples", "2", "--prompts", "4", "--json", str(numbers)
    again = forked("eval", str(tmp_path / "whole"), *arguments)
    assert again.returncode == 0, again.stderr
    (result,) = json.loads(numbers.read_text())["models"]
    assert result["reward"] == pytest.approx(ours[-1]["eval/reward"], abs=1e-5)
    audit = forked("audit", str(tmp_path / "whole"), "--steps", "1")
    assert f"rewards/{judge.name}" in audit.stdout and "OUTSIDE" not in audit.stdout, audit.stdout
