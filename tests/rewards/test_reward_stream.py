"""Rewards of finished groups while others are still sampled: every group once, in its place, whatever the order."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

from vdr_cli.errors import DataError
from vdr_cli.rewards.base import LoadedReward, TrainerState
from vdr_cli.rewards.stream import RewardStream
from vdr_cli.samples import Completions, Prompt

G = 2
PROMPTS = [Prompt(row, f"prompt {row}", [1], {"answer": row * 10}) for row in (4, 7, 9)]


def completions(groups: list[int]) -> Completions:
    """Completion g of group i is the token 10 i + g, 1 + g times."""
    ids = torch.tensor([[10 * i + g] * (G + 1) for i in groups for g in range(G)])
    lengths = torch.tensor([1 + g for _ in groups for g in range(G)])
    mask = torch.arange(G + 1) < lengths[:, None]
    prompts = torch.ones((len(ids), 1), dtype=torch.int64)
    return Completions(prompts, prompts.bool(), ids, mask, torch.zeros(ids.shape), torch.zeros(len(ids)).bool())


def stream(*functions: Any, timeout: float = 5.0, loaded: list[LoadedReward] | None = None) -> RewardStream:
    """loaded: functions that are loaded already."""
    loaded = loaded or [LoadedReward(getattr(f, "__name__", "f"), 1.0, f) for f in functions]

    def texts_of(rows: list[int], given: Completions) -> list[str]:
        pairs = zip(rows, given.completion_ids[:, 0].tolist(), strict=True)
        return [f"{PROMPTS[row // G].row}:{token}" for row, token in pairs]

    return RewardStream(loaded, PROMPTS, G, timeout, TrainerState(3, 5), texts_of)


def first_token(completion_ids, **_):
    return [float(ids[0]) for ids in completion_ids]


async def answers(answer, completion_ids, **_):
    await asyncio.sleep(0)
    return [float(a + len(ids)) for a, ids in zip(answer, completion_ids, strict=True)]


@pytest.mark.parametrize("order", [[[0, 1, 2]], [[2], [0, 1]], [[1], [2], [0]]])
def test_rewards_and_texts_stand_where_their_completions_do(order) -> None:
    found = stream(first_token, answers)
    for groups in order:
        found.finished(groups, completions(groups))
    texts, rewards = found.result()
    assert texts == ["4:0", "4:1", "7:10", "7:11", "9:20", "9:21"]
    assert rewards[:, 0].tolist() == [0, 1, 10, 11, 20, 21]
    assert rewards[:, 1].tolist() == [41, 42, 71, 72, 91, 92]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_group_is_rewarded_before_the_others_are_sampled(is_async: bool) -> None:
    seen = threading.Event()

    def plain(completion_ids, **_):
        seen.set()
        return [0.0] * len(completion_ids)

    async def awaited(completion_ids, **_):
        return plain(completion_ids)

    found = stream(awaited if is_async else plain)
    found.finished([1], completions([1]))
    assert seen.wait(10)
    found.finished([0, 2], completions([0, 2]))
    assert found.result()[1].shape == (6, 1)


def test_async_calls_of_several_groups_wait_together() -> None:
    waiting = threading.Barrier(3)

    async def judge(completion_ids, **_):
        await asyncio.get_running_loop().run_in_executor(None, waiting.wait, 10)
        return [1.0] * len(completion_ids)

    found = stream(judge)
    for group in range(3):
        found.finished([group], completions([group]))
    assert found.result()[1].sum() == 6


def test_other_functions_are_called_one_after_another_in_order() -> None:
    calls: list[Any] = []

    def plain(completion_ids, trainer_state, **_):
        calls.append((len(calls), completion_ids[0][0], trainer_state.global_step))
        return [0.0] * len(completion_ids)

    found = stream(plain)
    for group in (2, 0, 1):
        found.finished([group], completions([group]))
    found.result()
    assert calls == [(0, 20, 3), (1, 0, 3), (2, 10, 3)]


def test_an_error_and_a_hang_are_told_at_the_end() -> None:
    def fails_on_7(completion_ids, answer, **_):
        return [{40: 1.0, 90: 2.0}[a] for a in answer]

    found = stream(fails_on_7)
    for group in range(3):
        found.finished([group], completions([group]))
    with pytest.raises(DataError, match="reward fails_on_7 raised on dataset row 7"):
        found.result()

    def hangs(**_):
        threading.Event().wait()

    found = stream(hangs, timeout=0.1)
    found.finished([0, 1, 2], completions([0, 1, 2]))
    with pytest.raises(DataError, match=r"hangs had not returned after 0.1 s"):
        found.result()


def test_a_batch_without_groups_has_no_rewards() -> None:
    texts, rewards = RewardStream(
        [LoadedReward("f", 1.0, first_token)], [], G, 5.0, TrainerState(), lambda *_: []
    ).result()
    assert texts == [] and rewards.shape == (0, 1)
