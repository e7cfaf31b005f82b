"""Completions of the next step in a checkpoint: whole after a resume, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vdr_cli.config import Config
from vdr_cli.engine import collectives
from vdr_cli.environments.episodes import OneTurn
from vdr_cli.rewards.base import LoadedReward
from vdr_cli.rewards.stream import RewardStream
from vdr_cli.samples import Completions, Prompt
from vdr_cli.training import pending_rollout
from vdr_cli.training.pending_rollout import PendingRollout, reward_stream


def completions(first: int, groups: int, width: int) -> Completions:
    """Two a group; a completion's tokens are its row number, prompts are the group's."""
    rows = torch.arange(2 * first, 2 * (first + groups))
    mask = torch.ones((len(rows), width), dtype=torch.bool)
    prompts = (rows // 2)[:, None].repeat(1, width + 1)
    ids = rows[:, None].repeat(1, width)
    return Completions(prompts, torch.ones_like(prompts).bool(), ids, mask, -ids / 7, rows % 3 == 0)


class Words:
    pad_token_id = 0

    def batch_decode(self, rows: list[list[int]], **_: object) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


def a_run() -> Any:
    def first(completion_ids, **_):
        return [float(ids[0]) for ids in completion_ids]

    return SimpleNamespace(
        config=Config.model_validate({"rollout": {"group_size": 2}}),
        rewards=[LoadedReward("first", 1.0, first)],
        tokenizer=Words(),
        step=4,
        prompt_at=lambda position: Prompt(position, f"p{position}", [1]),
    )


def begin(run: Any) -> Callable[[list[Prompt]], tuple[OneTurn, RewardStream]]:
    def begun(prompts: list[Prompt]) -> tuple[OneTurn, RewardStream]:
        episodes = OneTurn(run.tokenizer, prompts, 2)
        return episodes, reward_stream(run.config, run.rewards, episodes, 4)

    return begun


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_groups_are_shared_out_again_and_rewarded_again(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Any = a_run()
    parts = [([50, 51], completions(0, 2, 3)), ([52], completions(2, 1, 5))]

    def gathered(value: Any) -> list[Any]:
        return [value, (parts[1][0], vars(parts[1][1]), [])]

    monkeypatch.setattr(collectives, "gather_objects", gathered)
    prompts = [run.prompt_at(position) for position in parts[0][0]]
    episodes, stream = begin(run)(prompts)
    pending_rollout.save(PendingRollout(parts[0][0], episodes, lambda: parts[0][1], stream), tmp_path)
    monkeypatch.undo()

    shares = [3 * (rank + 1) // ranks - 3 * rank // ranks for rank in range(ranks)]
    tokens: list[int] = []
    for rank in range(ranks):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        loaded = pending_rollout.load(tmp_path, lambda count: shares, run.prompt_at, begin(run), 0)
        assert loaded is not None
        own = loaded.wait()
        assert len(own) == 2 * shares[rank] == 2 * len(loaded.episodes.prompts)
        texts, rewards = loaded.rewards.result()
        for row in range(len(own)):
            token = int(own.completion_ids[row, 0])
            width = int(own.completion_mask[row].sum())
            assert width == (5 if token >= 4 else 3) and texts[row] == " ".join([str(token)] * width)
            assert rewards[row, 0] == token and bool(own.truncated[row]) == (token % 3 == 0)
            assert torch.allclose(own.sampler_logps[row, :width], torch.tensor(-token / 7))
            assert loaded.episodes.prompts[row // 2].row == loaded.positions[row // 2] == 50 + token // 2
            tokens.append(token)
    assert tokens == [0, 1, 2, 3, 4, 5]


def test_a_checkpoint_without_them_has_none(tmp_path: Path) -> None:
    run = a_run()
    assert pending_rollout.load(tmp_path, lambda count: [count], run.prompt_at, begin(run), 0) is None
