"""Completions of the step before (rollout.ahead) in real runs: two ranks, five groups, ZeRO-3."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.options.conftest import Left, Run, assert_resumed

pytestmark = pytest.mark.timeout(1800)

AHEAD = {
    "rollout.ahead": 1,
    "rollout.backend": "vllm",  # the worker samples in its own process all the same
    "train.learning_rate": 5e-3,
    "train.checkpoint_every": 2,
    "train.steps": 4,
    "train.eval_every": 2,
    "train.eval_prompts": 3,
    "disagreement.mode": "end_of_sequence",
}
REWARDS = """
async def logs(completions, log_metric, log_extra, **_):
    log_metric("mine/length", sum(map(len, completions)) / len(completions))
    if len(completions) == 12:
        log_metric("of_twelve", 3.0)
        log_extra("twelve", completions)
    return [0.0] * len(completions)

def shows(completions, log_extra, **_):
    log_extra("length", list(map(len, completions)))
    return [float(c.count("1")) for c in completions]

class Talk:
    def reset(self, target, **columns):
        self.turns, self.asked = target % 3, 0

    def respond(self, messages):
        self.asked += 1
        return None if self.asked > self.turns else "="

    def get_reward(self):
        return float(self.asked)
"""


def training_runs(folder: Path) -> list[Run]:
    """In order."""
    turns = {**AHEAD, "train.steps": 3, "train.eval_every": 0, "rollout.environment": f"{folder}/mine.py:Talk"}
    turns |= {"rollout.max_turns": 3, "rollout.max_new_tokens": 4}
    logging = [{"name": f"{folder}/mine.py:{name}"} for name in ("logs", "shows")]
    logs = {**AHEAD, "train.steps": 3, "rewards.functions": logging}
    return [
        ("ahead", AHEAD),
        ("ahead@2", AHEAD),
        ("ahead_turns", turns),
        ("ahead_turns@2", turns),
        ("ahead_logs", logs),
        ("ahead_logs@2", logs),
        ("unmoved", {"train.steps": 3, "train.learning_rate": 1e-30}),
    ]


@pytest.fixture(scope="module")
def trained(work_through: Callable[..., Left], chosen: Any, tmp_path_factory: pytest.TempPathFactory) -> Left:
    folder = tmp_path_factory.mktemp("ahead")
    (folder / "mine.py").write_text(REWARDS)
    return work_through(folder, chosen(training_runs(folder)))


def test_every_run_ends_well(left: Left) -> None:
    assert set(left.ended.values()) == {"0"}


@pytest.mark.runs("ahead", "ahead_resumed")
def test_ahead_resumes_bit_for_bit(left: Left) -> None:
    assert_resumed(left, "ahead", 2)
    for step in (3, 4):
        assert left.table("ahead", step) == left.table("ahead_resumed", step)


@pytest.mark.runs("ahead_turns", "ahead_turns_resumed")
def test_episodes_played_ahead_are_played_again_by_a_resumed_run(left: Left) -> None:
    """The environments' rewards follow from turns that the first process had played."""
    assert_resumed(left, "ahead_turns", 2)
    table = left.table("ahead_turns", 3)
    assert table == left.table("ahead_turns_resumed", 3)
    assert max(table["turns"]) > 1 and max(table["rewards/Talk"]) > 0


@pytest.mark.runs("ahead_logs", "ahead_logs_resumed")
def test_what_reward_functions_log_is_of_all_ranks_and_the_same_after_a_resume(left: Left) -> None:
    """One rank has 8 completions, the other 12: as in TRL a metric is the mean over calls, here one to a rank."""
    assert_resumed(left, "ahead_logs", 2)
    for line in left.metrics("ahead_logs")[1:]:
        table = left.table("ahead_logs", line["step"])
        assert table["length"] == [len(text) for text in table["completion"]]
        assert table["twelve"] == [None] * 8 + table["completion"][8:]
        of_ranks = [sum(lengths) / len(lengths) for lengths in (table["length"][:8], table["length"][8:])]
        assert line["mine/length"] == pytest.approx(sum(of_ranks) / 2)
        assert line["of_twelve"] == 3.0
    assert left.table("ahead_logs", 3) == left.table("ahead_logs_resumed", 3)


@pytest.mark.runs("ahead", "unmoved")
def test_ahead_samples_under_the_weights_before_and_corrects_for_it(left: Left) -> None:
    """The second step's completions are the start model's, though the first step moved it far."""
    assert left.table("ahead", 2)["completion_ids"] == left.table("unmoved", 2)["completion_ids"]
    assert left.table("ahead", 3)["completion_ids"] != left.table("unmoved", 3)["completion_ids"]
    _, first, second, *_ = left.metrics("ahead")  # the first line is the evaluation at the start
    assert first["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    assert abs(second["sampling/importance_sampling_ratio/mean"] - 1.0) > 1e-3
    assert second["sampling/sampling_logp_difference/max"] > 0.1
    assert second["ratio/max"] == 1.0  # the clip compares with the policy of now


@pytest.mark.runs("ahead")
def test_every_phase_has_its_speed_and_share(left: Left) -> None:
    line = json.loads((left.of("ahead") / "metrics.jsonl").read_text().splitlines()[1])
    for phase in ("rollout", "disagreement", "update"):
        rate = line["step_tokens"] / line[f"time/{phase}"]
        assert line[f"tokens_per_second/{phase}"] == pytest.approx(rate)
        assert line[f"step_time_share/{phase}"] == pytest.approx(line[f"time/{phase}"] / line["step_time"])
