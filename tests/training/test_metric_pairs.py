"""A step's numbers, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from vdr_cli.training.metric_pairs import (
    bonus_pairs,
    completion_pairs,
    distinct_pairs,
    length_extremes,
    ratios,
    reward_pairs,
)

NAN = math.nan


def test_rewards_per_group_with_ddof_1_and_without_none() -> None:
    task = torch.tensor([0.0, 2.0, 4.0, 5.0, 5.0, NAN])
    rewards = torch.stack([task, torch.tensor([NAN, NAN, NAN, 1.0, 3.0, NAN])], dim=1)
    found = ratios(reward_pairs(rewards, task, torch.tensor([False, True]), 3, ["a", "b"]))
    assert found == pytest.approx(
        {
            "reward": 16 / 5,
            "reward_std": (2.0 + 0.0) / 2,
            "frac_reward_zero_std": 0.5,
            "rewards/a/mean": 16 / 5,
            "rewards/a/std": 1.0,
            "rewards/b/mean": 2.0,
            "rewards/b/std": math.sqrt(2.0),
        }
    )


def test_lengths_of_all_and_of_those_that_ended() -> None:
    mask = torch.arange(5)[None] < torch.tensor([2, 5, 3])[:, None]
    found = ratios(completion_pairs(mask, torch.tensor([False, True, False])))
    assert found == pytest.approx(
        {
            "completions/mean_length": 10 / 3,
            "completions/mean_terminated_length": 2.5,
            "completions/clipped_ratio": 1 / 3,
        }
    )


def test_the_shortest_and_longest_and_of_those_that_ended() -> None:
    least, most = length_extremes(torch.tensor([2, 5, 3, 1]), torch.tensor([False, True, False, True]))
    assert least == {"completions/min_length": 1.0, "completions/min_terminated_length": 2.0}
    assert most == {"completions/max_length": 5.0, "completions/max_terminated_length": 3.0}
    least, most = length_extremes(torch.tensor([4]), torch.tensor([True]))
    assert least["completions/min_terminated_length"] == math.inf == -most["completions/max_terminated_length"]


def test_distinct_completions_of_a_group() -> None:
    texts = ["a", "a", "b", "c", "c", "c"]
    assert ratios(distinct_pairs(texts, 3)) == {"completions/distinct": 1.5}
    assert ratios(distinct_pairs([[{"role": "assistant", "content": text}] for text in texts], 2)) == {
        "completions/distinct": 4 / 3
    }


def test_disagreement_in_groups() -> None:
    reduced, bonus = torch.tensor([1.0, 3.0, 2.0, 2.0]), torch.tensor([-0.5, 0.5, 0.0, 0.0])
    found = ratios(bonus_pairs("disagreement", reduced, bonus, torch.tensor([True, False]), reduced > 1.0, 2))
    assert found == pytest.approx(
        {
            "disagreement/mean": 2.0,
            "disagreement/group_std": math.sqrt(2.0) / 2,
            "disagreement/groups_with_spread": 0.5,
            "disagreement/gate_open": 0.75,
            "disagreement/bonus_abs": 0.25,
        }
    )


def test_what_nothing_contributed_to_is_absent() -> None:
    assert ratios({"a": (0.0, 0.0), "b": (1.0, 2.0)}) == {"b": 0.5}
