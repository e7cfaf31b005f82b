"""Answers: the text, the reward function's say, or a function of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.test_batch import batch_of
from vdr_cli.config import Config
from vdr_cli.errors import ConfigError, DataError
from vdr_cli.rewards.base import LoadedReward
from vdr_cli.training.answers import answer_keys, answers_of

MINE = """
import time
def hangs(completions): time.sleep(60)
def last(completions, completion_ids): return [ids[0] for ids in completion_ids]
def bad(completions): return [1]
def boom(completions): raise ValueError('no')
"""


def config_of(answer: str | None = None) -> Config:
    return Config.model_validate({"model": {"name": "m"}, "bonus": {"source": "counts", "answer": answer}})


def reward(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def test_by_default_the_text_without_white_space_at_its_ends() -> None:
    batch = batch_of([0, 1], 2)
    object.__setattr__(batch, "texts", [" a b\n", [{"role": "assistant", "content": "c "}]])
    assert answers_of(config_of(), [LoadedReward("r", 1.0, reward)])(batch) == ["a b", "c"]


def test_a_reward_function_may_know_classes() -> None:
    def last(completions: list[str], **_: Any) -> list[str | None]:
        return [None if text == "t3" else text[-1] for text in completions]

    loaded = [LoadedReward("r", 1.0, reward), LoadedReward("s", 1.0, reward, solution_class=last)]
    assert answers_of(config_of(), loaded)(batch_of([3, 14], 2)) == ["t3", "4"], "the text where it gives none"


def test_a_function_of_the_users_goes_first(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    batch = batch_of([3, 14], 2)
    assert answers_of(config_of(f"{path}:last"), [])(batch) == ["3", "14"]
    with pytest.raises(DataError, match=r"bonus\.answer .*:bad must return a list of 2 entries, .* it returned 1"):
        answers_of(config_of(f"{path}:bad"), [])(batch)
    with pytest.raises(DataError, match=r"bonus\.answer .*:boom raised on dataset row 3: .*no"):
        answers_of(config_of(f"{path}:boom"), [])(batch)
    with pytest.raises(ConfigError, match=r"bonus\.answer: .* no function none there"):
        answers_of(config_of(f"{path}:none"), [])


def test_a_function_of_the_users_that_hangs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    config = config_of(f"{path}:hangs")
    quick = config.model_copy(update={"rewards": config.rewards.model_copy(update={"timeout": 0.2})})
    with pytest.raises(DataError, match=r"^bonus\.answer .*:hangs had not returned after 0\.2 s on dataset row"):
        answers_of(quick, [])(batch_of([3, 14], 2))


def test_a_function_of_the_users_may_need_a_main_thread(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Time limits by SIGALRM, as math_verify sets them."""
    path = tmp_path / "timed.py"
    path.write_text(
        "import signal\ndef last(completions):\n    signal.alarm(0)\n    return [t[-1] for t in completions]\n"
    )
    assert answers_of(config_of(f"{path}:last"), [])(batch_of([3, 14], 2)) == ["3", "4"]
    assert f"bonus.answer {path}:last needs the main thread (signal.alarm)" in caplog.text


def test_keys_tell_prompts_and_answers_apart() -> None:
    batch = batch_of([0, 1, 1], 2)
    first, second, third = answer_keys(batch, ["a", "a", "a"])
    assert second == third and first != second
    assert len({*answer_keys(batch, ["a", "b", "c"])}) == 3
