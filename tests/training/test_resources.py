"""Parts derived from a run's settings."""

from __future__ import annotations

from types import SimpleNamespace

from vdr_cli.config import Config
from vdr_cli.data.order import stream_indices
from vdr_cli.engine.reference import FrozenCopy
from vdr_cli.training.resources import Resources


def resources(config: Config, **parts: object) -> Resources:
    given = {name: None for name in Resources.__dataclass_fields__ if name != "timer"}
    return Resources(**{**given, "config": config, "prompts": list("abcdefg"), **parts})  # type: ignore[arg-type]


def test_the_order_of_prompts_is_the_seeds() -> None:
    orders = []
    for seed in (0, 5):
        res = resources(Config.model_validate({"train": {"seed": seed}}))
        orders.append([res.prompt_at(position) for position in range(9)])
        rows = stream_indices(7, 0, 9, seed, True)
        assert orders[-1] == ["abcdefg"[row] for row in rows]
    assert orders[0] != orders[1]


def test_weights_are_the_functions() -> None:
    rewards = [SimpleNamespace(weight=0.5), SimpleNamespace(weight=-2.0)]
    assert resources(Config(), rewards=rewards).reward_weights().tolist() == [0.5, -2.0]


def test_only_a_reference_of_its_own_follows_the_policy() -> None:
    followed: list[int] = []
    copy = FrozenCopy.__new__(FrozenCopy)
    copy.synchronise = lambda: followed.append(1)  # type: ignore[method-assign]
    resources(Config(), reference=copy).synchronise_reference()
    resources(Config(), reference=SimpleNamespace()).synchronise_reference()
    assert followed == [1]


def test_tokens_are_shown_in_the_first_step_and_where_completions_are_saved() -> None:
    config = Config.model_validate({"observe": {"completions_every": 4}, "train": {"steps": 10}})
    res = resources(config)
    assert [step for step in range(10) if res.shows_tokens(step)] == [0, 3, 7, 9]
