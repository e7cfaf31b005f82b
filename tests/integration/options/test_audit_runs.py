"""`vdr audit` of real runs: every setting that changes a number, in short runs whose steps are all recomputed.

VDR_AUDIT_RUNS=name,name limits the matrix to these runs, for scripts/verify/plant.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vdr_cli.audit.audit import audit_run
from vdr_cli.beds.registry import BEDS

pytestmark = pytest.mark.timeout(1800)

Settings = dict[str, Any]

ALL = {
    "observe.audit_every": 1,
    "train.checkpoint_every": 1,
    "train.keep_last": 9,
    "train.steps": 2,
}
EOS = {"disagreement.mode": "end_of_sequence", "disagreement.members": 4}
PER_TOKEN = {"disagreement.mode": "per_token", "disagreement.members": 4}
TWICE = {"grpo.num_iterations": 2, "train.steps": 4, "train.learning_rate": 3e-3}
"""Two updates a rollout, far enough apart for ratios to be clipped."""
CLIPPED = {"grpo.epsilon_low": 0.01, "grpo.epsilon_high": 0.02}

LOSSES: dict[str, Settings] = {
    "dapo": {
        **TWICE,
        **CLIPPED,
        "train.adam_betas": [0.7, 0.95],
        "train.adam_epsilon": 1e-4,
        "train.weight_decay": 0.2,
        "train.max_grad_norm": 0.3,
        "train.seed": 7,
    },
    "grpo": {**TWICE, **CLIPPED, "grpo.loss": "grpo", "grpo.delta": 1.03, "train.lr_schedule": "cosine"},
    "dr_grpo": {
        "grpo.loss": "dr_grpo",
        "grpo.scale_rewards": "none",
        "train.lr_schedule": "linear",
        "train.warmup_steps": 2,
        "train.steps": 4,
        "train.max_grad_norm": 0.0,
    },
    "cispo": {**TWICE, **CLIPPED, "grpo.loss": "cispo", "rollout.temperature": 1.3, "rollout.top_p": 0.8},
    "gspo": {**TWICE, **CLIPPED, "grpo.loss": "gspo", "rollout.min_p": 0.05, "rollout.repetition_penalty": 1.2},
    "sapo": {**TWICE, "grpo.loss": "sapo", "grpo.entropy_weight": 0.3, "rollout.temperature": 0.7},
    "batch": {
        "grpo.scale_rewards": "batch",
        "grpo.overlong_cache": 3,
        "grpo.mask_truncated": True,
        "rollout.max_new_tokens": 6,
        "grpo.loss": "dapo",
    },
    "minibatches": {**TWICE, **CLIPPED, "grpo.minibatches": 2, "train.prompts_per_step": 4, "train.steps": 8},
    "clip_cov": {**TWICE, "grpo.loss": "clip_cov", "grpo.clip_cov_share": 0.2, "grpo.clip_cov_low": 0.1},
    "kl_cov": {**TWICE, "grpo.loss": "kl_cov", "grpo.kl_cov_share": 0.1, "grpo.kl_cov_weight": 0.7},
    "entropy_target": {
        "grpo.entropy_target": 1.0,
        "grpo.entropy_delta": 0.3,
        "grpo.entropy_max": 0.5,
        "train.steps": 4,
    },
}
"""Losses, their clips and entropy terms, the optimizer and its learning rate."""

BONUSES: dict[str, Settings] = {
    "last_k": {**EOS, "disagreement.scope": "last_k", "disagreement.last_k": 2, "train.seed": 3},
    "members": {**EOS, "bonus.clip": 1.0, "train.steps": 3, "disagreement.dropout": 0.25, "train.seed": 11},
    "rmi": {**EOS, "disagreement.measure": "rmi", "bonus.shape": "multiplicative"},
    "by_token": {**PER_TOKEN, "disagreement.mask_sharing": "token", "disagreement.last_n": 3},
    "rmi_tokens": {**PER_TOKEN, "disagreement.measure": "rmi"},
    "linear": {**EOS, "bonus.schedule": "linear", "bonus.schedule_fraction": 0.8, "train.steps": 3},
    "cosine": {**EOS, "bonus.schedule": "cosine", "bonus.gate": "zero_variance", "train.steps": 3},
    "staircase": {**EOS, "bonus.schedule": "staircase", "train.steps": 4, "bonus.shape": "reward"},
}
"""Members, measures, and the bonus that is made of them."""

REWARDS = """
def digits(completions, **_):
    return [None if "+" in str(text) else sum(c.isdigit() for c in str(text)) / 4 for text in completions]

def length(completion_ids, trainer_state, **_):
    return [len(ids) + trainer_state.global_step for ids in completion_ids]

class Again:
    # asks for as many answers as the row's target says, with more words each time
    def reset(self, target, **columns):
        self.turns, self.asked = target % 3, 0

    def respond(self, messages):
        self.asked += 1
        return None if self.asked > self.turns else "=" * self.asked + ":"

    def get_reward(self):
        return float(self.asked)

async def target(prompts, completions, target, **_):
    return [float(str(t) in text) for t, text in zip(target, completions)]
"""


def batches(folder: Path) -> dict[str, Settings]:
    """Runs with other data, rewards, sampling, KL or advantages; folder: where prepare() put its files."""
    mine = [{"name": f"{folder}/mine.py:{name}", "weight": w} for name, w in (("digits", 1.5), ("length", 0.25))]
    two = {"rewards.functions": [{"name": "countdown"}, *mine, {"name": f"{folder}/mine.py:target", "weight": -0.5}]}
    own = {"data.name": f"{folder}/seven.jsonl", "rewards.functions": two["rewards.functions"]}
    return {
        "acting": {
            "rollout.members": True,
            "disagreement.members": 3,
            "bonus.source": "none",
            "rollout.temperature": 1.2,
        },
        "rewards": {**two, **EOS, "bonus.shape": "quality"},
        "gdpo": {**two, **EOS, "grpo.multi_reward": "normalise_then_sum", "bonus.shape": "reward"},
        "epochs": {**own, "train.steps": 3, "rewards.solved_at": 0.5, **PER_TOKEN, "bonus.gate": "incorrect"},
        "kl_reward": {"grpo.beta": 0.5, "grpo.kl": "k1", "grpo.kl_in": "reward", "rollout.temperature": 0.8},
        "kl_loss": {"grpo.beta": 0.5, "grpo.kl": "k2", "grpo.sync_reference_every": 2, "train.steps": 4},
        "quantile": {
            "grpo.advantage": "maxrl",
            "grpo.top_entropy_quantile": 0.3,
            "grpo.importance_cap": 0.9,
            "rollout.top_k": 4,
        },
        "stop": {
            "grpo.advantage": "leave_one_out",
            "rollout.stop": ["+", "3"],
            "data.shuffle": False,
            "train.prompts_per_step": 3,
        },
        "ends": {
            "grpo.advantage": "pass_at_k",
            "grpo.pass_k": 2,
            "model.name": f"{folder}/ends",
            "data.name": "starter",
            "rewards.functions": [{"name": "countdown"}],
        },
    }


def alone(folder: Path) -> dict[str, Settings]:
    """Runs of one process."""
    return {
        **LOSSES,
        **batches(folder),
        **BONUSES,
        "bfloat16": {**EOS, "model.dtype": "bfloat16"},
        "zero1": {**EOS, "engine.ds_config": "zero1", "train.weight_decay": 0.1},
    }


def together(folder: Path) -> dict[str, Settings]:
    """Runs of two processes, of two and three groups."""
    return {
        "credit": {**PER_TOKEN, "disagreement.credit": "token", "disagreement.discount": 0.9},
        "credit_rmi": {**PER_TOKEN, "disagreement.credit": "token", "disagreement.measure": "rmi"},
        "lora": {
            **EOS,
            "model.lora": {"rank": 4, "alpha": 8},
            "grpo.beta": 0.1,
            "train.weight_decay": 0.1,
            "train.seed": 9,
        },
        "acting_two": {
            **EOS,
            "rollout.members": True,
            "disagreement.scope": "full",
            "disagreement.dropout": 0.2,
            "grpo.minibatches": 5,
            "train.steps": 10,
        },
        "minibatches_two": {**EOS, "grpo.minibatches": 5, "train.steps": 10, "train.learning_rate": 1e-3},
        "turns": {
            **PER_TOKEN,
            "disagreement.credit": "token",
            "disagreement.discount": 0.9,
            "grpo.beta": 0.1,
            "rollout.environment": f"{folder}/mine.py:Again",
            "rollout.episode_tokens": 40,
            "rewards.functions": [{"name": f"{folder}/mine.py:digits"}],
        },
        "resample": {"grpo.resample_groups": 3, "train.steps": 3},
        "ahead": {**EOS, "rollout.ahead": 1, "rollout.backend": "vllm", "train.steps": 3, "train.learning_rate": 5e-3},
        "kl_k3": {"grpo.beta": 0.5, "grpo.kl_in": "reward", "grpo.kl": "k3", "train.learning_rate": 3e-3},
        "two": {**TWICE, **EOS, "engine.ds_config": "zero2", "train.weight_decay": 0.1},
    }


RESUMED = ({**EOS, "train.steps": 2, "train.seed": 2}, {**EOS, "train.steps": 4, "train.seed": 2})

LEFT_OUT = {"ahead": {"tokens drawn"}, "turns": {"prompt tokens", "replies, lengths, truncated", "rewards"}}
"""Quantities that a server's or an environment's part in them keeps from being made again."""

NAMES = [*alone(Path()), *together(Path()), "resumed"]
CHOSEN = os.environ.get("VDR_AUDIT_RUNS", "").split(",") if os.environ.get("VDR_AUDIT_RUNS") else NAMES


def prepare(folder: Path) -> None:
    """A reward file, a data set shorter than two steps, and the starter with a second end token."""
    (folder / "mine.py").write_text(REWARDS)
    lines = [json.dumps(row) for row in BEDS["starter"].rows("train")[:7]]
    (folder / "seven.jsonl").write_text("\n".join(lines) + "\n")
    shutil.copytree(BEDS["starter"].model_path, folder / "ends")
    generation = json.loads((folder / "ends" / "generation_config.json").read_text())
    generation["eos_token_id"] = [1, 5]
    (folder / "ends" / "generation_config.json").write_text(json.dumps(generation))


@pytest.fixture(scope="module")
def runs(work_through: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audited")
    prepare(folder)
    one = [(name, {**ALL, **settings}) for name, settings in alone(folder).items() if name in CHOSEN]
    one += [("resumed", {**ALL, **settings}) for settings in RESUMED if "resumed" in CHOSEN]
    two = [(name, {**ALL, **settings}) for name, settings in together(folder).items() if name in CHOSEN]
    left = work_through(folder, two, alone=one)
    assert set(left.ended.values()) == {"0"}, left.ended
    return folder


@pytest.mark.parametrize("name", [name for name in NAMES if name in CHOSEN])
def test_every_number_of_the_run_is_recomputed(runs: Path, name: str) -> None:
    lines = audit_run(runs / name)
    outside = [line for line in lines if line.within is False]
    shown = [
        f"step {line.step} {line.quantity}: {line.on_file} on file, {line.recomputed} recomputed, "
        f"{line.difference} apart {line.note}"
        for line in outside
    ]
    assert not outside, "\n".join(shown)
    left_out = {line.quantity: line.note for line in lines if line.within is None}
    assert left_out.keys() == LEFT_OUT.get(name, set())
