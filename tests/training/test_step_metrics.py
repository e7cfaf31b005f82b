"""The record of a step: its numbers, and its completions as columns."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.training.test_batch import batch_of
from vdr_cli.config import Config
from vdr_cli.engine.engine import StepResult
from vdr_cli.errors import DataError
from vdr_cli.grpo.losses import LossInputs, Totals
from vdr_cli.rewards.base import LoadedReward
from vdr_cli.rewards.logs import Logs
from vdr_cli.training import step_metrics
from vdr_cli.training.batch import Advantages, Bonus, Updates
from vdr_cli.training.completion_table import completion_columns, shown_group
from vdr_cli.training.opening import open_source
from vdr_cli.training.timing import PhaseTimer


def resources(**sections: Any) -> Any:
    config = Config.model_validate({"rollout": {"group_size": 2}, **sections})
    timer = PhaseTimer()
    with timer.phase("step"):
        pass
    rewards = [LoadedReward("one", 1.0, lambda **_: [])]
    engine = SimpleNamespace(peak_flops=lambda: None)
    parts = {"rewards": rewards, "timer": timer, "engine": engine, "shown_measure": lambda: None}
    return SimpleNamespace(config=config, source=open_source(config), **parts)


def bonus_of(per_completion: torch.Tensor, added: torch.Tensor) -> Bonus:
    """With a gate that is open for the first half of the completions."""
    return Bonus(per_completion, torch.arange(len(per_completion)) < len(per_completion) / 2, added)


def test_completions_hold_the_bonus_as_it_was_added() -> None:
    res = resources(disagreement={"mode": "per_token"})
    batch = batch_of([0, 1], 2)
    mask = batch.completions.completion_mask  # one token, then two
    bonus = torch.tensor([[0.5, 7.0], [0.2, 0.4]])
    advantages = Advantages(LossInputs(bonus * 2, mask), torch.zeros(2), bonus_of(torch.tensor([1.0, 2.0]), bonus))
    columns = completion_columns(res, batch, advantages)
    assert columns["bonus"] == pytest.approx([0.5, 0.3])
    assert columns["advantage"] == pytest.approx([1.0, 0.6])
    assert columns["bald"] == [1.0, 2.0] and columns["rewards/one"] == [0.0, 1.0]
    assert columns["completion_ids"] == [[0], [1, 1]]


def test_a_steps_numbers_count_valid_tokens_and_every_iteration_once() -> None:
    res = resources(disagreement={"mode": "per_token"}, grpo={"num_iterations": 2}, train={"steps": 4})
    batch = batch_of([0, 1, 2, 3], 3)  # 1, 2, 3 and 1 tokens
    mask = batch.completions.completion_mask
    bonus = torch.tensor([[0.5, 9.0, 9.0], [-0.5, 1.0, 9.0], [0.0, 0.0, 0.0], [0.0, 9.0, 9.0]])
    per_completion, task = torch.tensor([1.0, 3.0, 2.0, 2.0]), torch.tensor([0.5, -0.5, 1.0, 0.0])
    updates = Updates(
        loss=3.0, pairs={"entropy": (6.0, 4.0)}, minima={"clip_ratio/low_min": 0.25}, maxima={"ratio/max": 1.5}
    )
    updates.maxima["clip_ratio/high_max"] = -math.inf  # nothing to count
    for _ in range(2):
        updates.end_step(Totals(completions=4.0, tokens=7.0), StepResult(2.0, refused=False))
    advantages = Advantages(LossInputs(bonus, mask), task, bonus_of(per_completion, bonus))
    found = step_metrics.step_metrics(res, batch, advantages, updates)
    expected = {
        "loss": 1.5,
        "entropy": 1.5,
        "ratio/max": 1.5,
        "grad_norm": 2.0,
        "advantage_abs": 0.5,
        "disagreement/bonus_abs": 2.0 / 7,
        "disagreement/groups_with_spread": 0.5,
        "disagreement/gate_open": 0.5,
        "completions/min_length": 1.0,
        "completions/max_length": 3.0,
        "step_tokens": 7.0,
        "completions/distinct": 2.0,
        "completions/min_terminated_length": 1.0,
        "completions/max_terminated_length": 3.0,
        "clip_ratio/low_min": 0.25,
        "denominator/completions": 4.0,
        "denominator/tokens": 7.0,
        "refused_steps": 0.0,
        "reward": 1.5,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert "clip_ratio/high_max" not in found


@pytest.mark.parametrize(("source", "shown"), [("disagreement", False), ("surprisal", True), ("none", True)])
def test_a_group_is_shown_unless_its_tokens_are_still_to_be_measured(source: str, shown: bool) -> None:
    """A source that measures no tokens has nothing to wait for."""
    res = resources(bonus={"source": source})
    res.tokenizer = SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")
    batch = batch_of([0, 1], 2)
    zeros = torch.zeros(2)
    advantages = Advantages(
        LossInputs(torch.zeros(2, 2), batch.completions.completion_mask), zeros, bonus_of(zeros, zeros)
    )
    samples = shown_group(res, batch, advantages)
    assert (samples is not None) is shown
    if samples is not None:
        assert [list(sample.disagreement) for sample in samples] == [[0.0], [0.0, 0.0]]


def test_what_functions_logged_is_in_the_line_and_in_the_table() -> None:
    res = resources()
    res.rewards = [LoadedReward("one", 1.0, lambda completions, log_metric: [])]
    batch = batch_of([0, 1], 2)
    batch = replace(batch, logs=Logs([{"text": "a"}, {"score": 0.5}], {"mine": (3.0, 2.0), "nothing": (math.nan, 1.0)}))
    advantages = Advantages(LossInputs(torch.zeros(2, 2), batch.completions.completion_mask), torch.zeros(2))
    found = step_metrics.logged_metrics(res, batch)
    assert found["mine"] == 1.5 and math.isnan(found["nothing"])
    columns = completion_columns(res, batch, advantages)
    assert columns["text"] == ["a", None] and columns["score"] == [None, 0.5]


@pytest.mark.parametrize("name", ["reward", "completion", "group", "rewards/one", "bald"])
def test_a_logged_column_may_not_take_the_place_of_another(name: str) -> None:
    res = resources(disagreement={"mode": "end_of_sequence"})
    batch = replace(batch_of([0, 1], 2), logs=Logs([{name: 1}, {}]))
    zeros = torch.zeros(2)
    inputs = LossInputs(torch.zeros(2, 2), batch.completions.completion_mask)
    with pytest.raises(DataError, match=f"log_extra: {name} is a column of completions/ already"):
        completion_columns(res, batch, Advantages(inputs, zeros, bonus_of(zeros, zeros)))
