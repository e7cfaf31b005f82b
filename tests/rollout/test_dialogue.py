"""Completions of several turns: what was sampled and what was said, in order, each token read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.rollout.test_transformers_rollout import EOS, KEYS, PAD, PROMPTS, full_logits, tiny
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.samples import Completions, Reply, Sampling, Turn

T, TURN = 24, 5
ENDS = [EOS, *range(2, 12)]


def rollout(**settings: Any) -> TransformersRollout:
    return TransformersRollout(PAD, ENDS, **settings)


class Scripted:
    """Answers a turn with as many tokens as its row and number say; an episode has 1, 2 or 3 turns."""

    def __init__(self) -> None:
        self.turns: dict[int, list[Turn]] = {}
        self.said: dict[int, list[list[int]]] = {}

    def replies(self, turns: Sequence[Turn]) -> list[Reply]:
        return [self.reply(turn) for turn in turns]

    def reply(self, turn: Turn) -> Reply:
        before = self.turns.setdefault(turn.row, [])
        before.append(turn)
        if len(before) > turn.row % 3:
            return Reply(None)
        ids = [30 + (turn.row + k) % 9 for k in range((turn.row + len(before)) % 4)] + [EOS]
        if len(ids) >= turn.room:
            return Reply(None, truncated=True)
        if turn.ended:
            self.said.setdefault(turn.row, []).append(ids)
        return Reply(ids)


def talk(name: str = "qwen2", batch_tokens: int = 10**6, **backend: Any) -> tuple[Any, Scripted, Completions]:
    model, script = tiny(name, spread=1.5), Scripted()
    request = RolloutRequest(PROMPTS, 3, Sampling(T, 0.9, turn_tokens=TURN), KEYS, conversation=script)
    return model, script, rollout(batch_tokens=batch_tokens, **backend).generate(model, request)


def ids_of(out: Completions) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(out.completion_ids, out.completion_mask, strict=True)]


@pytest.mark.parametrize("backend", [{}, {"cuda_graphs": "on"}])
def test_a_completion_is_its_turns_and_replies_in_order(backend: dict[str, Any]) -> None:
    _, script, out = talk(**backend)
    several = 0
    for row, ids in enumerate(ids_of(out)):
        expected: list[int] = []
        flags: list[bool] = []
        turns, said = script.turns[row], script.said.get(row, [])
        for number, turn in enumerate(turns):
            expected += turn.ids
            flags += [True] * len(turn.ids)
            assert 1 <= len(turn.ids) <= TURN and turn.ended == (turn.ids[-1] in ENDS)
            if number < len(turns) - 1:
                expected += said[number]
                flags += [False] * len(said[number])
        assert ids == expected
        assert out.policy_mask[row, : len(ids)].tolist() == flags
        assert not out.policy_mask[row, len(ids) :].any()
        assert bool(out.truncated[row]) == (not turns[-1].ended)
        several += len(turns) > 1
    assert several > 2 and out.truncated.any() and not out.truncated.all()


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma", "sliding"])
def test_log_probabilities_are_those_under_the_full_history(name: str) -> None:
    model, _, out = talk(name)
    logps = (full_logits(model, out) / 0.9).log_softmax(-1).gather(-1, out.completion_ids[..., None])[..., 0]
    assert torch.allclose(out.sampler_logps, logps * out.policy_mask, atol=1e-5)


def test_neither_batch_nor_order_changes_an_episode() -> None:
    _, _, together = talk()
    _, _, apart = talk(batch_tokens=1)
    assert ids_of(together) == ids_of(apart)
    assert torch.equal(together.policy_mask, apart.policy_mask)


def test_every_token_goes_through_the_trunk_once() -> None:
    model, read = tiny("qwen2", spread=1.5), 0

    def count(module: Any, arguments: Any, keywords: Any) -> None:
        nonlocal read
        read += keywords["input_ids"].numel()

    model.model.register_forward_pre_hook(count, with_kwargs=True)
    request = RolloutRequest(PROMPTS, 3, Sampling(T, 0.9, turn_tokens=TURN), KEYS, conversation=Scripted())
    out = rollout(batch_tokens=1).generate(model, request)
    unread = len(out)  # nothing follows an episode's last token
    assert read == 3 * sum(map(len, PROMPTS)) + int(out.completion_mask.sum()) - unread


def test_a_stop_string_ends_the_turn_in_which_it_stands_and_no_other() -> None:
    class Words:
        def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
            return ["".join(f"<{token}>" for token in row) for row in rows]

    class Says(Scripted):
        def reply(self, turn: Turn) -> Reply:
            self.turns.setdefault(turn.row, []).append(turn)
            return Reply([7, 7]) if len(self.turns[turn.row]) == 1 else Reply(None)

    model, script = tiny("qwen2", spread=1.0), Says()
    sampling = Sampling(T, 1.0, stop=("<7>",), turn_tokens=TURN)
    rollout(tokenizer=Words()).generate(model, RolloutRequest(PROMPTS, 8, sampling, KEYS, conversation=script))
    turns = [turn for own in script.turns.values() for turn in own]
    assert {turn.ids[-1] for turn in turns if turn.ended} <= {7, *ENDS}
    assert all(7 not in turn.ids[:-1] for turn in turns)
    assert any(len(turn.ids) > 1 for own in script.turns.values() for turn in own[1:])
