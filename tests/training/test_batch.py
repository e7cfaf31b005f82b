"""Rows of a batch go everywhere together; micro-batches hold what belongs to their rows."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vdr_cli.grpo.losses import LossInputs, LossOutput
from vdr_cli.samples import Completions, Prompt
from vdr_cli.training.batch import (
    RewardedGroups,
    Updates,
    concatenate,
    micro_batches_of,
    shared_micro_batches,
)


def batch_of(rows: list[int], width: int) -> RewardedGroups:
    """Row r: its number in every token, text and reward."""
    numbers = torch.tensor(rows)
    ids = numbers[:, None].repeat(1, width)
    mask = torch.arange(width)[None] < (numbers % width + 1)[:, None]
    completions = Completions(ids, torch.ones_like(mask), ids, mask, -ids / 10, numbers % 2 == 1)
    prompts = [Prompt(row, f"p{row}", [row]) for row in rows]
    texts, rewards = [f"t{row}" for row in rows], numbers[:, None].float()
    return RewardedGroups(prompts, completions, texts, rewards, numbers.float(), [10 + row for row in rows])


def check(batch: RewardedGroups, rows: list[int]) -> None:
    assert [prompt.row for prompt in batch.prompts] == rows
    assert batch.texts == [f"t{row}" for row in rows]
    assert batch.completions.completion_ids[:, 0].tolist() == rows
    assert batch.completions.truncated.tolist() == [row % 2 == 1 for row in rows]
    assert batch.rewards[:, 0].tolist() == rows == batch.task_reward.tolist()
    assert batch.positions == [10 + row for row in rows]


def test_selected_rows_keep_everything_of_theirs() -> None:
    whole = concatenate([batch_of([0, 1, 2], 3), batch_of([3, 4], 5)], pad_id=9)
    check(whole, [0, 1, 2, 3, 4])
    check(whole.select(torch.tensor([4, 1, 3])), [4, 1, 3])
    assert whole.completions.completion_ids[0].tolist() == [0, 0, 0, 9, 9]
    assert whole.completions.prompt_ids[0].tolist() == [9, 9, 0, 0, 0]


def test_a_micro_batch_holds_its_rows_numbers() -> None:
    batch = batch_of([0, 1, 2, 3, 4], 5)
    advantages, weights = torch.arange(25.0).view(5, 5), torch.arange(25.0).view(5, 5) + 100
    inputs = LossInputs(advantages, batch.completions.completion_mask, weights=weights)
    first, second, third = micro_batches_of(batch.completions, inputs, 2, torch.device("cpu"))
    assert second.tokens[2].tolist() == [[2] * 4, [3] * 4]  # without the column that is padding in both
    assert torch.equal(second.inputs.advantages, advantages[2:4, :4])
    assert torch.equal(second.inputs.weights, weights[2:4, :4]) and second.inputs.entropy_weights is None
    assert second.inputs.mask.tolist() == [[True, True, True, False], [True] * 4]
    assert len(first.inputs.mask) == 2 and len(third.inputs.mask) == 1


def test_a_sequence_group_takes_part_in_everybodys_micro_batches() -> None:
    """The other rank's first, then ours, then both seconds: in the same order on both."""

    def parts(rows: list[int]) -> list[Any]:
        batch = batch_of(rows, 5)
        weights = torch.ones(len(rows), 5)
        inputs = LossInputs(weights, batch.completions.completion_mask, weights=weights)
        return micro_batches_of(batch.completions, inputs, 1, torch.device("cpu"))

    group: Any = SimpleNamespace(rank=1, gather_objects=lambda ours: [parts([7, 8]), ours])
    shared = shared_micro_batches(parts([3, 4]), group)
    assert [int(micro.tokens[2][0, 0]) for micro in shared] == [7, 3, 8, 4]
    assert [micro.own for micro in shared] == [False, True, False, True]
    assert shared_micro_batches(shared, None) is shared


def test_updates_add_up_pairs_and_keep_the_largest() -> None:
    updates = Updates()
    batch, weights = batch_of([0], 1), torch.ones(1, 1)
    inputs = LossInputs(weights, batch.completions.completion_mask, weights=weights)
    (micro,) = micro_batches_of(batch.completions, inputs, 1, torch.device("cpu"))
    for loss, top, extreme in ((1.0, 3.0, -0.25), (2.0, 4.0, -0.5), (0.0, 0.0, math.nan)):
        pair, value = (torch.tensor(top), torch.tensor(2.0)), torch.tensor(extreme)
        updates.add(micro, LossOutput(torch.tensor(loss), {"x": pair}, {"z": value}, {"y": value}))
    updates.add(replace(micro, own=False), LossOutput(torch.tensor(5.0), {"x": pair}, {"z": -value}, {"y": -value}))
    assert updates.loss == pytest.approx(3.0)
    assert updates.pairs == {"x": (7.0, 6.0)} and updates.maxima == {"y": -0.25} and updates.minima == {"z": -0.5}
