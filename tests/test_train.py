"""Pieces of the loop, each alone, on one rank."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.training.test_batch import batch_of, check
from vdr_cli import train
from vdr_cli.config import Config, GrpoConfig
from vdr_cli.environments.episodes import OneTurn
from vdr_cli.exploration.bonus import RunningRms
from vdr_cli.rewards.base import is_solved
from vdr_cli.rewards.logs import Logs
from vdr_cli.training.batch import RewardedGroups
from vdr_cli.training.opening import open_source
from vdr_cli.training.state import LoopState


def resources(**sections: Any) -> Any:
    config = Config.model_validate({"rollout": {"group_size": 2}, "train": {"steps": 10}, **sections})
    return SimpleNamespace(config=config, source=open_source(config), reward_weights=lambda: torch.ones(1))


def bonus_of(
    res: Any, batch: RewardedGroups, measure: list[float], step: int = 0, rms: RunningRms | None = None
) -> Tensor:
    """The bonus that is added to advantages of 0."""
    task, state = torch.zeros(len(batch)), LoopState(step=step, rms=rms or RunningRms())
    signals = {"measure": torch.tensor(measure)}
    advantages, bonus = train.add_bonus(res, state, batch, signals, batch.task_reward, task)
    assert torch.equal(advantages, bonus.added) and bonus.per_completion.tolist() == measure
    return bonus.added


def test_stalled_groups_are_replaced_where_they_stood() -> None:
    batch, fresh = batch_of([0, 1, 2, 3, 4, 5], 3), batch_of([10, 11, 12, 13], 3)
    replaced = train.replace_groups(batch, torch.tensor([True, False, True]), fresh, 2, pad_id=9)
    check(replaced, [10, 11, 2, 3, 12, 13])
    assert train.replace_groups(batch, torch.zeros(3, dtype=torch.bool), fresh, 2, 9) is batch


def test_the_denominators_count_valid_tokens() -> None:
    mask = torch.tensor([[True, False, False], [True, True, False]])
    totals = train.step_totals(mask)
    assert (totals.completions, totals.tokens) == (2, 3)


def test_the_bonus_is_scaled_by_an_rms_that_knows_this_step() -> None:
    res, rms = resources(bonus={"weight": 0.5}), RunningRms()
    rms.update(9.0, 1.0)
    bonus = bonus_of(res, batch_of([0, 1, 2, 3], 4), [1.0, 3.0, 2.0, 2.0], rms=rms)
    root = ((0.99 * 9.0 + 2 / 4) / 1.99) ** 0.5  # deviations -1, 1, 0, 0
    assert bonus.tolist() == pytest.approx([-0.5 / root, 0.5 / root, 0.0, 0.0])


def test_the_weight_follows_the_step() -> None:
    res = resources(bonus={"weight": 1.0, "schedule": "linear", "clip": 1.0})
    sizes = [float(bonus_of(res, batch_of([0, 1], 4), [1.0, 3.0], step)[1]) for step in (0, 5, 9)]
    assert sizes == pytest.approx([1.0, 0.5, 0.1])


def test_a_reward_that_reaches_solved_at_is_solved() -> None:
    res = resources(bonus={"gate": "incorrect"}, rewards={"solved_at": 1.0})
    bonus = bonus_of(res, batch_of([0, 1, 2, 3], 4), [1.0, 3.0, 1.0, 3.0])
    assert bonus[0] != 0 and bonus[1:].tolist() == [0, 0, 0]


@pytest.mark.parametrize("weights", [(0.7, 0.2, 0.1), (0.6, 0.3, 0.1), (0.35, 0.35, 0.3)])
@pytest.mark.parametrize("kind", [np.float64, np.float32, torch.float32])
def test_weights_that_add_up_to_one_solve_a_task(weights: tuple[float, ...], kind: Any) -> None:
    """0.7 + 0.2 + 0.1 is 0.9999999999999999, and a rounding is no wrong answer."""
    parts = [torch.tensor(w, dtype=kind) if isinstance(kind, torch.dtype) else kind(w) for w in weights]
    total = parts[0] + parts[1] + parts[2]
    values = torch.stack([total, total - 1e-4]) if isinstance(kind, torch.dtype) else np.array([total, total - 1e-4])
    assert is_solved(values, 1.0).tolist() == [True, False]
    near = torch.tensor([0.95, 0.9], dtype=torch.float32)
    assert is_solved(near, 0.95).tolist() == is_solved(near.double().numpy(), 0.95).tolist() == [True, False]
    assert not is_solved(torch.tensor([torch.nan]), 0.0).any()


def group_advantages_of(added: list[float], rewards: list[float], **grpo: Any) -> list[float]:
    """Advantages of one group with one function, and what joins its reward."""
    config = Config.model_validate({"rollout": {"group_size": len(rewards)}, "grpo": grpo})
    given = torch.tensor(rewards)
    total = given + torch.tensor(added)
    return train.group_relative(config, torch.ones(1), given[:, None], total).tolist()


def test_what_joins_a_normalised_sum_keeps_its_size() -> None:
    """β, λ and an overlong penalty are small or large as they are set; a z-score would make them all alike."""
    rewards, unit = [0.0, 1.0, 0.0, 1.0], [1.0, -1.0, -1.0, 1.0]
    std = (4 / 3 * 0.25) ** 0.5 + 1e-4
    for size in (0.0, 1e-3, 1.0):
        score = torch.tensor([(r - 0.5) / std + size * x for r, x in zip(rewards, unit, strict=True)])
        expected = (score / (score.std() + 1e-4)).tolist()
        found = group_advantages_of([size * x for x in unit], rewards, multi_reward="normalise_then_sum")
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("rollout", "given", "cap"), [({}, None, None), ({"members": True}, None, 2.0), ({"members": True}, 1.5, 1.5)]
)
def test_completions_of_members_are_corrected_even_if_nothing_is_set(rollout, given, cap) -> None:
    config = Config.model_validate({"rollout": rollout, "grpo": {"importance_cap": given, "loss": "sapo"}})
    settings = train.loss_settings(config)
    assert (settings.importance_cap, settings.loss) == (cap, "sapo")


def test_the_kl_comes_off_the_reward_beta_times() -> None:
    cfg = GrpoConfig(beta=0.5, kl="k1", kl_in="reward")
    batch = batch_of([0, 1], 2)  # one token, then two
    policy, reference = torch.full((2, 2), -1.0), torch.full((2, 2), -1.5)
    rewards = train.rewards_less_kl(cfg, batch, train.ReferenceLogps(reference, policy))
    assert rewards.tolist() == pytest.approx([0.0 - 0.25, 1.0 - 0.5])
    assert train.rewards_less_kl(cfg, batch, train.ReferenceLogps()) is batch.task_reward


@pytest.mark.parametrize(("masked", "counted"), [(False, [1, 2, 3, 1]), (True, [1, 0, 3, 0])])
def test_truncated_completions_train_unless_they_are_masked(masked: bool, counted: list[int]) -> None:
    res = resources(grpo={"mask_truncated": masked}, bonus={"source": "none"})
    batch = batch_of([0, 1, 2, 3], 3)  # the odd ones are truncated
    found = train.reward_head(res, LoopState(), batch, train.ReferenceLogps(), {})
    assert found.inputs.mask.sum(1).tolist() == counted


def test_long_completions_pay_the_overlong_penalty() -> None:
    res = resources(rollout={"group_size": 2, "max_new_tokens": 3}, grpo={"overlong_cache": 2})
    res.timer = train_timer()
    res.reward_models = SimpleNamespace(ready=nullcontext)
    batch = batch_of([0, 1, 2, 3], 3)
    pending = SimpleNamespace(
        wait=lambda: batch.completions,
        rewards=SimpleNamespace(result=lambda: (batch.texts, batch.rewards), logs=Logs()),
        episodes=OneTurn(None, batch.prompts[::2], 2),
        positions=[7, 9],
    )
    found = train.await_rollout(res, pending)  # type: ignore[arg-type]
    assert found.task_reward.tolist() == pytest.approx([0.0, 1.0 - 0.5, 2.0 - 1.0, 3.0])
    assert found.positions == [7, 7, 9, 9]


def train_timer() -> Any:
    from vdr_cli.training.timing import PhaseTimer

    return PhaseTimer()
