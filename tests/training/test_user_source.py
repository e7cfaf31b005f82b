"""A bonus of the user's own: what it is given, and the line for what it returns wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.test_batch import batch_of
from vdr_cli.config import Config
from vdr_cli.errors import ConfigError, DataError
from vdr_cli.exploration.sources import Numbers, Signals
from vdr_cli.training.user_source import user_source


@pytest.fixture
def function(tmp_path: Path) -> Any:
    def write(body: str, arguments: str = "rewards, masks") -> str:
        name = f"f{len(list(tmp_path.iterdir()))}"
        path = tmp_path / f"{name}.py"
        path.write_text(f"import time\nimport torch\ndef {name}({arguments}):\n    {body}\n")
        return f"{path}:{name}"

    return write


def numbers_of(given: str, **bonus: Any) -> Numbers:
    batch = batch_of([0, 1, 2, 3], 3)  # 1, 2, 3 and 1 tokens
    mask, ones = batch.completions.completion_mask, torch.ones(4)
    signals = Signals(2, mask, batch.task_reward, ones > 0, ones, log_probs=-mask.float(), batch=batch)
    config = Config.model_validate(
        {"model": {"name": "m"}, "bonus": {"source": given, **bonus}, "rewards": {"timeout": 0.5}}
    )
    return user_source(given).numbers(signals, config)


def test_a_number_per_completion(function: Any) -> None:
    found = numbers_of(
        function("return [len(c) + float(r) for c, r in zip(completions, rewards)]", "completions, rewards")
    )
    assert found.b.tolist() == found.per_completion.tolist() == [2.0, 3.0, 4.0, 5.0]
    found = numbers_of(function("return [row[m].mean() for row, m in zip(log_probs, masks)]", "log_probs, masks"))
    assert found.b.tolist() == [-1.0] * 4


@pytest.mark.parametrize(
    "body",
    ["return -log_probs * 2 + 5 * ~masks", "return [[2.0] * int(n) for n in masks.sum(1)]"],
    ids=["whole", "rows"],
)
def test_a_number_per_token(function: Any, body: str) -> None:
    found = numbers_of(function(body, "log_probs, masks"))
    assert (
        found.b.tolist() == [[2, 0, 0], [2, 2, 0], [2, 2, 2], [2, 0, 0]] and found.per_completion.tolist() == [2.0] * 4
    )


def test_what_it_does_not_take_is_not_computed(function: Any) -> None:
    assert user_source(function("return rewards")).needs == {"batch"}
    assert user_source(function("return rewards", "rewards, entropies")).needs == {"batch", "entropies"}
    everything = "prompts, completions, ids, masks, log_probs, entropies, rewards, columns"
    assert user_source(function("return rewards", everything)).needs == {"batch", "log_probs", "entropies"}


def test_it_cannot_change_what_the_loss_sees(function: Any) -> None:
    batch = batch_of([0, 1], 2)
    numbers_of(function("rewards.zero_(); masks.zero_(); return [1.0, 2.0, 3.0, 4.0]"))
    assert batch.task_reward.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [1.0]", r"returned the shape \(1,\); it must return 4 numbers, one per completion, or \(4, 3\)"),
        ("return [[1.0], [1.0], [1.0], [1.0]]", r"returned the shape \(4, 1\)"),
        ("return None", "returned a NoneType that is not numbers; it must return 4"),
        ("return ['a', 'b', 'c', 'd']", "returned a list that is not numbers"),
        ("return rewards / 0", "returned a number that is not finite for a completion of dataset row 0"),
        (
            "return torch.full((4, 3), float('nan'))",
            "returned a number that is not finite for a completion of dataset row 0",
        ),
        ("raise KeyError('x')", r"raised: KeyError: 'x' \(f0\.py:4\)"),
        ("raise SystemExit(3)", "raised: SystemExit: 3"),
        ("time.sleep(30)", "had not returned after 0.5 s"),
    ],
)
def test_bad_answers_are_one_line(function: Any, body: str, said: str) -> None:
    with pytest.raises(DataError, match=f"bonus.source .*:f0 {said}") as caught:
        numbers_of(function(body))
    assert "\n" not in str(caught.value)


def test_numbers_per_token_need_a_shape_that_takes_them(function: Any) -> None:
    given = function("return masks.float()")
    with pytest.raises(ConfigError, match=r"bonus\.shape reward needs one number per completion"):
        numbers_of(given, shape="reward")
    assert isinstance(numbers_of(given, shape="plain").b, Tensor)


def test_an_unknown_argument_is_refused_before_the_run(function: Any) -> None:
    with pytest.raises(ConfigError, match="needs the argument logits, which nothing provides; there are prompts"):
        user_source(function("return rewards", "rewards, logits"))
    assert user_source(function("return rewards", "rewards, logits=None")).needs == {"batch"}
    with pytest.raises(ConfigError, match=r"bonus\.source: .*no function g there"):
        user_source(function("return rewards").rpartition(":")[0] + ":g")
