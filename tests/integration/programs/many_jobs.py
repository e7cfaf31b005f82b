"""Several jobs in one process, as in a notebook: python many_jobs.py FOLDER. The last line is `all done`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from vdr_cli.config import DataConfig, RolloutConfig
from vdr_cli.config.load import load_config
from vdr_cli.config.schema import RewardsConfig
from vdr_cli.evaluation.evaluate import run_eval
from vdr_cli.evaluation.request import EvalRequest
from vdr_cli.scoring.request import ScoreRequest
from vdr_cli.scoring.score import run_score
from vdr_cli.train import train

FOLDER = Path(sys.argv[1])
SMALL = [
    "rollout.group_size=4", "rollout.max_new_tokens=6", "train.prompts_per_step=2", "train.steps=2",
    "observe.tensorboard=false", "observe.report=false", "observe.live=off", "train.checkpoint_every=1",
]  # fmt: skip
REWARD = f"{FOLDER / 'rewards.py'}:interrupting"
REWARDS = "rewards.functions=" + json.dumps([{"name": REWARD}])


def run(name: str, *settings: str, resume: str | None = None) -> int:
    return train(load_config(None, [*SMALL, f"train.output={FOLDER / name}", *settings]), resume)


def evaluate() -> None:
    model = str(FOLDER / "first" / "model")
    rewards = RewardsConfig.model_validate({"functions": [{"name": REWARD}]})
    rollout = RolloutConfig(max_new_tokens=6)
    request = EvalRequest((model,), DataConfig(name="starter"), rewards, rollout, samples=2, prompts=2)
    (result,) = run_eval(request)
    assert result.solved.shape == (2, 2)


def score() -> None:
    output = FOLDER / "scores.jsonl"
    output.unlink(missing_ok=True)
    assert run_score(ScoreRequest((str(FOLDER / "first"),), "starter", str(output))).rows > 0


before = dict(os.environ)
assert run("first") == 0
assert dict(os.environ).get("RANK") == before.get("RANK"), "children of this process are not its rank"
score()
evaluate()
assert run("second", "disagreement.mode=none", "grpo.beta=0.1") == 0
evaluate()
os.environ["INTERRUPT"] = "once"
assert run("interrupted", REWARDS, "train.steps=4") == 130, "Ctrl-C saves and returns"
assert run("interrupted", REWARDS, "train.steps=4", resume="auto") == 0
os.environ["INTERRUPT"] = "twice"
try:
    run("stopped", REWARDS)
except KeyboardInterrupt:
    print("stopped at once")
assert run("third", "disagreement.mode=per_token") == 0
score()
print("all done")
