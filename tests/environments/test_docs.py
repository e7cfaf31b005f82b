"""The examples of docs/environments.md work as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.environments.conftest import tokenizer_of
from vdr_cli.config import RolloutConfig
from vdr_cli.data.prompts import Limits
from vdr_cli.environments.contract import load_contract
from vdr_cli.environments.episodes import Environments
from vdr_cli.rewards.loading import find_function
from vdr_cli.samples import Messages, Prompt, Turn

PAGE = Path(__file__).parents[2] / "docs" / "environments.md"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, body in re.findall(r"```python\n# (\w+\.py)(.*?)```", PAGE.read_text(), re.S):
        (tmp_path / name).write_text(f"#{body}")
    return tmp_path


def played(
    cfg: RolloutConfig, prompt: str | Messages, said: list[str], **columns: object
) -> tuple[Environments, list[str | None]]:
    """An episode of these turns, and what the model read after each."""
    contract = load_contract(cfg.environment, cfg.tools)
    assert contract is not None
    tokenizer = tokenizer_of("plain" if isinstance(prompt, str) else "qwen2.5")
    own = Environments(contract, tokenizer, cfg, not isinstance(prompt, str), Limits())
    episodes = own.begin([Prompt(0, prompt, [1], columns or {"secret": 7})], 1)
    answers: list[str | None] = []
    for text in said:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        (reply,) = episodes.replies([Turn(0, ids, True, 999)])
        answers.append(None if reply.ids is None else tokenizer.decode(reply.ids))
    return own, answers


def test_the_game_in_plain_text(files: Path) -> None:
    cfg = RolloutConfig(environment=f"{files}/guess.py:Guess")
    own, answers = played(cfg, "number: ", ["3", "maybe 9", "what", "7"])
    assert answers == [" higher ", " lower ", " a number? ", None]
    solved = find_function(f"{files}/guess.py:solved")
    assert solved(environments=own._open[0].environments) == [1.0]
    own.close()


def test_the_box_and_the_calculator(files: Path) -> None:
    cfg = RolloutConfig(environment=f"{files}/box.py:Box", tools=[f"{files}/calculator.py:add"])
    calls = [f'<tool_call>{{"name": "open", "arguments": {{"code": {code}}}}}</tool_call>' for code in (-1, 3, 7)]
    calls.append('<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>')
    own, answers = played(cfg, [{"role": "user", "content": "Open it."}], [*calls, "Done."])
    results = ["{'error': 'the lock has no negative numbers'}", "Nothing happens.", "It opens.", "5"]
    assert all(result in str(answer) for result, answer in zip(results, answers, strict=False)) and answers[-1] is None
    episodes = own._open[0]
    assert episodes.prompts[0].value == [{"role": "user", "content": "Open it. It is locked."}]
    assert own.contract.reward is not None
    assert own.contract.reward.name == "Box" and own.contract.reward.function(episodes.environments) == [1.0]
    own.close()
