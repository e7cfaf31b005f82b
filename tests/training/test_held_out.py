"""Held-out evaluations: which prompts, with what, and what the loop remembers of them."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from vdr_cli.config.load import load_config
from vdr_cli.training import audit_record, held_out
from vdr_cli.training.timing import PhaseTimer


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every evaluation, which finds pass@1 0.5."""
    given: list[dict[str, Any]] = []

    def evaluate_model(*arguments: Any, **named: Any) -> Any:
        given.append({"prompts": arguments[3], **vars(arguments[4]), **named})
        return SimpleNamespace(metrics=lambda: {"pass@1": 0.5, "reward": 0.25})

    monkeypatch.setattr(held_out, "evaluate_model", evaluate_model)
    monkeypatch.setattr(audit_record, "save_evaluation", lambda *_: None)
    return given


def resources(prompts: list[str] | None) -> Any:
    @contextmanager
    def gathered_model() -> Any:
        yield "model"

    overrides = ["model.name=other", "train.eval_prompts=3", "train.eval_samples=4", "rewards.solved_at=0.5"]
    parts = dict.fromkeys(("tokenizer", "rewards", "sampling"))
    return SimpleNamespace(
        config=load_config(overrides=overrides),
        held_out=prompts,
        engine=SimpleNamespace(gathered_model=gathered_model, by_layers=False),
        timer=PhaseTimer(),
        environments=None,
        rollout=SimpleNamespace(rest=lambda: None),
        reward_models=SimpleNamespace(ready=nullcontext),
        **parts,
    )


def state(pending: Any = None) -> Any:
    best: list[float] = []
    return SimpleNamespace(pending=pending, best=best, remember_best=best.append)


def test_without_held_out_prompts_there_is_nothing(evaluated: list[dict[str, Any]]) -> None:
    assert held_out.evaluate(resources(None), state(), None) == {}
    assert evaluated == []


def test_the_first_prompts_are_evaluated_and_the_best_is_remembered(evaluated: list[dict[str, Any]]) -> None:
    res, loop = resources(["a", "b", "c", "d"]), state()
    assert held_out.evaluate(res, loop, None) == {"eval/pass@1": 0.5, "eval/reward": 0.25}
    (given,) = evaluated
    assert given["prompts"] == ["a", "b", "c"] and given["samples"] == 4 and given["ks"] == [1, 4]
    assert given["solved_at"] == 0.5
    assert loop.best == [0.5]
    assert set(res.timer.take()) == {"evaluation"}


def test_fewer_prompts_than_asked_for_are_all_evaluated(evaluated: list[dict[str, Any]]) -> None:
    held_out.evaluate(resources(["a"]), state(), None)
    assert evaluated[0]["prompts"] == ["a"]


def test_a_pending_rollout_ends_before_the_weights_are_used(evaluated: list[dict[str, Any]]) -> None:
    waited: list[int] = []
    pending = SimpleNamespace(wait=lambda: waited.append(len(evaluated)))
    held_out.evaluate(resources(["a"]), state(pending), None)
    assert waited == [0], "before the evaluation"
