"""Pieces of the loop, each alone, on one rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.training.test_batch import batch_of, check
from vdr_cli import train
from vdr_cli.config import Config
from vdr_cli.exploration.bonus import RunningRms
from vdr_cli.training import record
from vdr_cli.training.batch import Signal, concatenate


def a_run(**sections: Any) -> Any:
    base = {"rollout": {"group_size": 2}, "train": {"steps": 10}}
    config = Config.model_validate({**base, **sections})
    rewards = [SimpleNamespace(name="one", weight=1.0)]
    return SimpleNamespace(config=config, step=0, rms=RunningRms(), rewards=rewards)


def test_stalled_groups_are_replaced_where_they_stood() -> None:
    batch, fresh = batch_of([0, 1, 2, 3, 4, 5], 3), batch_of([10, 11, 12, 13], 3)
    replaced = train.replace_groups(batch, torch.tensor([True, False, True]), fresh, 2, pad_id=9)
    check(replaced, [10, 11, 2, 3, 12, 13])
    assert train.replace_groups(batch, torch.zeros(3, dtype=torch.bool), fresh, 2, 9) is batch


def test_the_denominators_count_valid_tokens() -> None:
    mask = torch.tensor([[True, False, False], [True, True, False]])
    totals = train.step_totals(Signal(torch.zeros(2, 3), mask, torch.zeros(2)))
    assert (totals.completions, totals.tokens) == (2, 3)


def test_the_bonus_is_scaled_by_an_rms_that_knows_this_step() -> None:
    run = a_run(disagreement={"mode": "end_of_sequence", "weight": 0.5})
    run.rms.update(9.0, 1.0)
    batch = batch_of([0, 1, 2, 3], 4)
    measured = torch.tensor([1.0, 3.0, 2.0, 2.0])
    task = torch.tensor([0.1, 0.2, 0.3, 0.4])
    advantages, reduced, bonus = train.add_bonus(run, batch, measured, batch.task_reward, task)
    rms = ((0.99 * 9.0 + 2 / 4) / 1.99) ** 0.5  # deviations -1, 1, 0, 0
    assert bonus.tolist() == pytest.approx([-0.5 / rms, 0.5 / rms, 0.0, 0.0])
    assert advantages.tolist() == pytest.approx((task + bonus).tolist())
    assert torch.equal(reduced, measured)


def test_the_weight_follows_the_step() -> None:
    run = a_run(disagreement={"mode": "end_of_sequence", "weight": 1.0, "schedule": "linear", "clip": 1.0})
    batch = batch_of([0, 1], 4)
    sizes = []
    for run.step in (0, 5, 9):
        _, _, bonus = train.add_bonus(run, batch, torch.tensor([1.0, 3.0]), batch.task_reward, torch.zeros(2))
        sizes.append(float(bonus[1]))
    assert sizes == pytest.approx([1.0, 0.5, 0.1])


def test_a_reward_that_reaches_solved_at_is_solved() -> None:
    run = a_run(disagreement={"mode": "end_of_sequence", "gate": "incorrect"}, rewards={"solved_at": 1.0})
    batch = batch_of([0, 1, 2, 3], 4)
    _, _, bonus = train.add_bonus(run, batch, torch.tensor([1.0, 3.0, 1.0, 3.0]), batch.task_reward, torch.zeros(4))
    assert bonus[0] != 0 and bonus[1:].tolist() == [0, 0, 0]


def test_completions_hold_the_bonus_as_it_was_added() -> None:
    run = a_run(disagreement={"mode": "per_token"})
    batch = concatenate([batch_of([0, 1], 2)], 0)
    mask = batch.completions.completion_mask  # one token, then two
    bonus = torch.tensor([[0.5, 7.0], [0.2, 0.4]])
    signal = Signal(bonus * 2, mask, torch.zeros(2), torch.tensor([1.0, 2.0]), bonus)
    columns = record.completion_columns(run, batch, signal)
    assert columns["bonus"] == pytest.approx([0.5, 0.3])
    assert columns["advantage"] == pytest.approx([1.0, 0.6])
    assert columns["bald"] == [1.0, 2.0] and columns["rewards/one"] == [0.0, 1.0]
    assert columns["completion_ids"] == [[0], [1, 1]]
