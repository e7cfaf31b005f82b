"""Episodes of several turns on a server of our own, against the backend in the process and the model itself."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rollout.conftest import KEYS, PROMPTS, tiny
from tests.rollout.conftest import connect as connected
from vdr_cli.errors import DataError, MachineError
from vdr_cli.models.policy import completion_logps
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.rollout.vllm_backend import VllmRollout
from vdr_cli.samples import Completions, Reply, Sampling, Turn

ENDS = tuple(range(1, 40, 4))
"""Tokens that end a turn: many, so that turns end."""


class Game:
    """Answers each turn by its own tokens; an episode is over when its turn's first token is divisible by five."""

    def __init__(self, most: int = 4, pause: float = 0.0) -> None:
        self.most, self.pause = most, pause
        self.turns: dict[int, list[Turn]] = {}
        self.calls = 0
        self.at_once = threading.Lock()

    def replies(self, turns: Sequence[Turn]) -> list[Reply]:
        assert self.at_once.acquire(blocking=False), "two threads at once"
        self.calls += 1
        if self.pause:
            time.sleep(random.random() * self.pause)
        found = [self.reply(turn) for turn in turns]
        self.at_once.release()
        return found

    def reply(self, turn: Turn) -> Reply:
        said = self.turns.setdefault(turn.row, [])
        said.append(turn)
        if not turn.ended or turn.ids[0] % 5 == 0:
            return Reply(None)
        ids = [3 + turn.ids[0] % 7, 4 + len(said)]
        if len(said) == self.most or len(ids) >= turn.room:
            return Reply(None, truncated=True)
        return Reply(ids)


def connect(fake: Any, directory: Path, **settings: Any) -> VllmRollout:
    rollout = connected(fake, directory, **settings)
    rollout.eos_ids = ENDS
    return rollout


def request(game: Game, temperature: float, **more: Any) -> RolloutRequest:
    sampling = Sampling(max_new_tokens=24, temperature=temperature, turn_tokens=6)
    return RolloutRequest(PROMPTS, 4, sampling, KEYS, conversation=game, **more)


def same(one: Completions, other: Completions) -> bool:
    parts = ("prompt_ids", "completion_ids", "completion_mask", "policy_mask", "truncated")
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in parts)


def test_greedy_episodes_are_those_of_the_backend_in_the_process(fake_vllm: Any, tmp_path: Path) -> None:
    model, games = tiny(), (Game(), Game())
    served = connect(fake_vllm, tmp_path).generate(model, request(games[0], 0.0))
    own = TransformersRollout(0, ENDS).generate(model, request(games[1], 0.0))
    assert same(served, own) and games[0].turns == games[1].turns
    assert torch.allclose(served.sampler_logps, own.sampler_logps, atol=1e-5)
    assert not served.policy_mask.equal(served.completion_mask)


def test_sampled_tokens_are_appended_and_their_log_probabilities_are_under_the_full_history(
    fake_vllm: Any, tmp_path: Path
) -> None:
    model, game = tiny(), Game()
    out = connect(fake_vllm, tmp_path).generate(model, request(game, 1.2))
    first = TransformersRollout(0, ENDS).generate(
        model, RolloutRequest(PROMPTS, 4, Sampling(6, 1.2), [key >> 1 for key in KEYS])
    )
    logps, _ = completion_logps(model, out.prompt_ids, out.prompt_mask, out.completion_ids, out.completion_mask, 1.2)
    assert torch.allclose(logps[out.policy_mask], out.sampler_logps[out.policy_mask], atol=1e-4)
    assert not out.sampler_logps[~out.policy_mask].any()
    for row, turns in game.turns.items():
        assert turns[0].ids == first.completion_ids[row, first.completion_mask[row]].tolist()
        own = out.completion_ids[row, out.policy_mask[row]].tolist()
        assert own == [token for turn in turns for token in turn.ids]
        assert int(out.completion_mask[row].sum()) <= 24 and all(len(turn.ids) <= 6 for turn in turns)
        assert bool(out.truncated[row]) == (not turns[-1].ended or turns[-1].ids[0] % 5 != 0)
    assert max(map(len, game.turns.values())) >= 3 and len(game.turns) == 12


def test_the_same_keys_give_the_same_episodes_whatever_the_timing_and_the_servers(
    fake_vllm: Any, tmp_path: Path
) -> None:
    second = type(fake_vllm)()
    try:
        model, told = tiny(), []
        expected = connect(fake_vllm, tmp_path).generate(model, request(Game(), 1.0))
        rollout = connect(fake_vllm, tmp_path, urls=[fake_vllm.url, second.url])
        wait = rollout.start(model, request(Game(pause=0.02), 1.0, finished=lambda at, group: told.append((at, group))))
        assert same(wait(), expected)
        assert sorted(at[0] for at, _ in told) == [0, 1, 2]
        for (prompt,), group in told:
            rows = expected.rows(slice(prompt * 4, prompt * 4 + 4)).trimmed()
            assert torch.equal(group.completion_ids, rows.completion_ids)
            assert torch.equal(group.policy_mask, rows.policy_mask)
    finally:
        second.stop()


def test_an_environment_or_a_server_that_fails_ends_the_call(fake_vllm: Any, tmp_path: Path) -> None:
    model, game = tiny(), Game()
    rollout = connect(fake_vllm, tmp_path)

    def fail(turns: Sequence[Turn]) -> list[Reply]:
        raise DataError("respond raised on dataset row 4: planted")

    game.replies = fail  # type: ignore[method-assign]
    with pytest.raises(DataError, match="dataset row 4"):
        rollout.generate(model, request(game, 1.0))
    fake_vllm.fails = 99
    with pytest.raises(MachineError, match="answered /v1/completions with 500"):
        rollout.generate(model, request(Game(), 1.0))
