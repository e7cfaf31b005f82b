"""Episodes in plain text: one instance each, its turns and replies in tokens, and what goes wrong, in one line."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from tests.environments.conftest import tokenizer_of
from vdr_cli.config import Config, RolloutConfig
from vdr_cli.data.prompts import Limits
from vdr_cli.environments.contract import load_contract
from vdr_cli.environments.episodes import Environments, ManyTurns
from vdr_cli.environments.parsers import parser_of
from vdr_cli.errors import ConfigError, DataError
from vdr_cli.rewards.calling import compute_rewards
from vdr_cli.samples import Prompt, Turn

GAME = '''
class Game:
    """Guess a number."""

    made = []

    def __init__(self):
        self.guesses, self.is_closed = [], False
        Game.made.append(self)

    def reset(self, secret, **columns):
        self.secret = secret

    def respond(self, messages):
        self.messages = messages
        self.guesses.append(messages[-1]["content"])
        if messages[-1]["content"] == self.secret:
            return None
        return " no, "

    def close(self):
        self.is_closed = True

    def get_reward(self):
        return 1.0 / len(self.guesses)
'''


def environments(tmp_path: Path, body: str, name: str = "plain", **settings: Any) -> Environments:
    path = tmp_path / f"env_{time.monotonic_ns()}.py"
    path.write_text(body)
    cfg = RolloutConfig(environment=f"{path}:Game", **settings)
    contract = load_contract(cfg.environment, cfg.tools)
    assert contract is not None
    return Environments(contract, tokenizer_of(name), cfg, name != "plain", Limits())


def prompts(tokenizer: Any) -> list[Prompt]:
    return [Prompt(row, text, tokenizer(text)["input_ids"], {"secret": "7"}) for row, text in ((4, "a:"), (9, "b:"))]


def turn(episodes: ManyTurns, row: int, text: str, ended: bool = True, room: int = 99) -> Turn:
    tokenizer = episodes.owner.tokenizer
    end = [tokenizer.eos_token_id] if ended else []
    return Turn(row, tokenizer(text)["input_ids"] + end, ended, room)


def test_an_episode_from_reset_to_close(tmp_path: Path) -> None:
    own = environments(tmp_path, GAME, max_turns=3)
    episodes = own.begin(prompts(own.tokenizer), 2)
    assert len(episodes.environments or []) == 4 and len(set(map(id, episodes.environments or []))) == 4
    first, second, third = episodes.replies(
        [turn(episodes, 0, "3"), turn(episodes, 1, "7"), turn(episodes, 3, "", False)]
    )
    assert own.tokenizer.decode(first.ids) == " no, " and not first.truncated
    assert second.ids is None and not second.truncated and third.ids is None
    (reply,) = episodes.replies([turn(episodes, 0, "7")])
    assert reply.ids is None
    asked = (episodes.environments or [])[0]
    assert asked.messages == [
        {"role": "user", "content": "a:"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": " no, "},
        {"role": "assistant", "content": "7"},
    ]
    assert episodes.texts([0], None) == [asked.messages[1:]]  # type: ignore[arg-type]
    assert [each.turns for each in episodes.counts] == [2, 1, 0, 1]
    assert own.contract.reward is not None and own.contract.reward.name == "Game"
    assert own.contract.reward.function(environments=[asked]) == [0.5]
    assert not asked.is_closed
    own.close()
    assert all(each.is_closed for each in episodes.environments or [])


def test_episodes_are_played_again_from_their_turns(tmp_path: Path) -> None:
    """As a resumed run does with what rollout.ahead had played; an environment that answers otherwise is named."""
    own = environments(tmp_path, GAME, max_turns=3)
    first = own.begin(prompts(own.tokenizer), 2)
    first.replies([turn(first, 0, "3"), turn(first, 1, "7"), turn(first, 2, "5", room=5)])
    first.replies([turn(first, 0, "7"), turn(first, 3, "", False)])
    again = own.begin(prompts(own.tokenizer), 2)
    again.replay(first.history())
    assert again.texts(range(4), None) == first.texts(range(4), None)  # type: ignore[arg-type]
    assert again.counts == first.counts and again.history() == first.history()
    assert [each.guesses for each in again.environments or []] == [each.guesses for each in first.environments or []]
    moody = [[(ids, ended, room, [1]) for ids, ended, room, _ in played] for played in first.history()]
    with pytest.raises(DataError, match="replied differently when the checkpoint's episode of dataset row 4"):
        own.begin(prompts(own.tokenizer), 2).replay(moody)
    own.close()


def test_every_episode_plays_on_a_board_of_its_own(tmp_path: Path) -> None:
    """The episodes of a group come from one row; an environment keeps what it got from it, and changes it."""
    board = "self.board = columns['board']; self.board.append(len(self.board))"
    own = environments(tmp_path, GAME.replace("self.secret = secret", board))
    (row,) = prompts(own.tokenizer)[:1]
    row.columns["board"] = [0]
    episodes = own.begin([row], 2)
    assert [each.board for each in episodes.environments or []] == [[0, 1], [0, 1]]
    assert row.columns["board"] == [0]
    own.close()


def test_limits_end_an_episode_as_truncated(tmp_path: Path) -> None:
    own = environments(tmp_path, GAME, max_turns=2)
    episodes = own.begin(prompts(own.tokenizer), 1)
    (no_room,) = episodes.replies([turn(episodes, 0, "3", room=5)])
    assert no_room.ids is None and no_room.truncated
    assert episodes.texts([0], None)[0][-1]["role"] == "assistant"  # type: ignore[arg-type]
    (first,) = episodes.replies([turn(episodes, 1, "3", room=6)])
    assert first.ids is not None
    (last,) = episodes.replies([turn(episodes, 1, "3")])
    assert last.ids is None and last.truncated
    assert (episodes.environments or [])[1].guesses == ["3", "3"]  # the last turn counts


def test_a_reply_with_a_token_that_the_model_lacks_is_one_line(tmp_path: Path) -> None:
    own = environments(tmp_path, GAME.replace('" no, "', '"<new>"'))
    entries = len(own.tokenizer)
    own.tokenizer.add_tokens(["<new>"])
    own.limits = Limits(vocabulary=entries)
    episodes = own.begin(prompts(own.tokenizer), 1)
    with pytest.raises(DataError, match=rf"the reply on dataset row 4: token {entries} of tokenizer .* outside"):
        episodes.replies([turn(episodes, 0, "3")])
    own.contract = environments(tmp_path, GAME.replace("self.secret = secret", "return '<new>'")).contract
    with pytest.raises(DataError, match=rf"the opening of dataset row 4: token {entries} of tokenizer .* outside"):
        own.begin(prompts(own.tokenizer), 1)


def test_what_reset_says_ends_the_prompt(tmp_path: Path) -> None:
    body = GAME.replace("self.secret = secret", "return f'({columns[\"prompt\"]} {secret})'")
    own = environments(tmp_path, body)
    episodes = own.begin(prompts(own.tokenizer), 2)
    assert [prompt.value for prompt in episodes.prompts] == ["a:(a: 7)", "b:(b: 7)"]
    assert [own.tokenizer.decode(prompt.token_ids) for prompt in episodes.prompts] == ["a:(a: 7)", "b:(b: 7)"]


@pytest.mark.parametrize("kind", ["", "async "])
def test_calls_of_several_episodes_run_beside_each_other(tmp_path: Path, kind: str) -> None:
    wait = "await asyncio.sleep(0.01)" if kind else "time.sleep(0.01)"
    respond = f"""{kind}def respond(self, messages):
        Game.at_once += 1
        while Game.at_once < 8:  # hangs where calls follow one another
            {wait}
"""
    body = "import asyncio, time\n" + GAME.replace("def respond(self, messages):\n", respond)
    own = environments(tmp_path, body.replace("made = []", "made, at_once = [], 0"))
    episodes = own.begin(prompts(own.tokenizer), 4)
    replies = episodes.replies([turn(episodes, row, "3") for row in range(8)])
    assert all(own.tokenizer.decode(reply.ids) == " no, " for reply in replies)


RESET, RESPOND = "self.secret = secret", 'return " no, "'
FAULTS = {
    "raises in reset": (
        RESET,
        "raise ValueError('planted')",
        r"Game: reset raised on dataset row 4: ValueError: planted",
    ),
    "resets to a number": (RESET, "return 3", r"reset returned int on dataset row 4; return text, or None"),
    "resets differently": (RESET, "return str(id(self))", r"different replies to episodes of dataset row 4"),
    "hangs in reset": (RESET, "import time; time.sleep(60)", r"reset had not returned after 0.3 s on dataset row 4"),
    "raises in respond": (RESPOND, "raise KeyError('x')", r"respond raised on dataset row 9: KeyError"),
    "answers a number": (RESPOND, "return 1", r"respond returned int on dataset row 9; return text, or None"),
    "hangs in respond": (
        RESPOND,
        "import time; time.sleep(60)",
        r"respond had not returned after 0.3 s on dataset row 9",
    ),
    "exits": (RESPOND, "import os; os._exit(0)", r"respond raised on dataset row 9: SystemExit"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_with_its_row_and_every_instance_is_closed(tmp_path: Path, fault: str) -> None:
    old, new, message = FAULTS[fault]
    own = environments(tmp_path, GAME.replace(old, new), tool_timeout=0.3)
    with pytest.raises(DataError, match=message) as raised:
        episodes = own.begin(prompts(own.tokenizer), 2)
        episodes.replies([turn(episodes, 2, "3")])
    assert "\n" not in str(raised.value)
    own.close()
    made = own.contract.environment.made  # type: ignore[union-attr]
    assert len(made) == 4 and all(each.is_closed for each in made)


LOOK = GAME + "\n    def look(self, {arguments}):\n        {body}\n"
CLASSES = {
    "needs arguments": (GAME.replace("__init__(self)", "__init__(self, size)"), "its constructor needs size; give"),
    "cannot be reset": (GAME.replace("def reset", "def restart"), "it has no method reset"),
    "nothing to do": ("class Game:\n    def reset(self, **columns): pass\n", "the model has nothing to do"),
    "no class": ("def Game(): pass\n", "it is not a class"),
    "no docstring": (LOOK.format(arguments="at: int", body="return 1"), "method look: it has no docstring"),
    "no type": (LOOK.format(arguments="at", body="'Look.'"), "method look: argument at has no type"),
    "no Args": (LOOK.format(arguments="at: int", body="'Look.'"), "method look: no schema can be made of it"),
    "any arguments": (LOOK.format(arguments="**more: int", body="'Look.'"), "calls a tool by named arguments"),
    "a keyword": (
        LOOK.format(arguments="", body="'Look.'") + "    look.__name__ = 'class'\n",
        "class is a keyword of Python",
    ),
    "not importable": ("raise OSError('one\\ntwo')\n", "importing .* failed: OSError: one two"),
    "leaves on import": ("import sys; sys.exit(3)\n", "importing .* failed: SystemExit: 3"),
    "no Python": ("class Game(:\n", "importing .* failed: SyntaxError"),
    "another name": ("class Other: pass\n", "no function Game there; it has Other"),
    "an unknown type": (LOOK.format(arguments="at: 'Odd'", body="'Look.'"), "method look: no schema can be made of it"),
    "no messages": (GAME.replace("respond(self, messages)", "respond(self)"), "respond takes no argument"),
}


@pytest.mark.parametrize("fault", CLASSES)
def test_a_class_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    body, message = CLASSES[fault]
    with pytest.raises(ConfigError, match=message) as raised:
        environments(tmp_path, body)
    assert "\n" not in str(raised.value) and "rollout.environment" in str(raised.value)


@pytest.mark.parametrize("given", ["countdown", "nothing.py:Game", "nosuchmodule:Game"])
def test_a_name_that_leads_nowhere_is_one_line_under_its_setting(given: str) -> None:
    """A built-in reward function is neither an environment, nor a tool, nor a parser."""
    calls = {
        "rollout.environment": lambda: load_contract(given, []),
        "rollout.tools": lambda: load_contract(None, [given]),
        "rollout.tool_parser": lambda: parser_of(given, ""),
    }
    for key, call in calls.items():
        with pytest.raises(ConfigError) as raised:
            call()
        line = str(raised.value)
        assert line.startswith(key) and given in line and "\n" not in line and raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("body", "why"), [("raise OSError('planted')", "OSError: planted"), ("import time; time.sleep(9)", "it hangs")]
)
def test_a_close_that_fails_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, body: str, why: str) -> None:
    """The rewards are there by then: a run is not stopped for it."""
    own = environments(tmp_path, GAME.replace("self.is_closed = True", body), tool_timeout=0.2)
    episodes = own.begin(prompts(own.tokenizer), 1)
    with caplog.at_level("WARNING"):
        episodes.close()
        episodes.close()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("rollout.environment") and f": close failed: {why}" in line and "\n" not in line


@pytest.mark.parametrize(
    ("body", "message"),
    [("raise OSError('planted')", "OSError: planted"), ("return 'much'", "'much'"), ("return float('inf')", "inf")],
)
def test_a_reward_of_the_environment_that_fails_is_named_after_its_class(
    tmp_path: Path, body: str, message: str
) -> None:
    own = environments(tmp_path, GAME.replace("return 1.0 / len(self.guesses)", body))
    episodes = own.begin(prompts(own.tokenizer), 1)
    assert own.contract.reward is not None
    given = list(episodes.prompts), [[{"role": "assistant", "content": "x"}]] * 2, [[1]] * 2, 9.0
    with pytest.raises(DataError, match=message) as raised:
        compute_rewards([own.contract.reward], *given, environments=episodes.environments)  # type: ignore[arg-type]
    line = str(raised.value)
    assert "Game" in line and "\n" not in line and raised.value.exit_code == 3
    own.close()


def test_a_client_of_an_async_environment_serves_its_reward_too(tmp_path: Path) -> None:
    """A connection belongs to the loop that opened it, so there is one for replies and rewards."""
    body = """
import asyncio

class Game:
    async def reset(self, **columns):
        self.lock = asyncio.Lock()
        await self.lock.acquire()
        asyncio.get_running_loop().call_later(0.5, self.lock.release)

    def respond(self, messages):
        return None

    async def get_reward(self):
        async with self.lock:
            return 1.0
"""
    own = environments(tmp_path, body)
    episodes = own.begin(prompts(own.tokenizer), 1)
    assert own.contract.reward is not None
    given = list(episodes.prompts), [[{"role": "assistant", "content": "x"}]] * 2, [[1]] * 2, 9.0
    found = compute_rewards([own.contract.reward], *given, environments=episodes.environments)  # type: ignore[arg-type]
    assert found[:, 0].tolist() == [1.0, 1.0]
    own.close()


def test_the_constructor_of_an_instance_may_fail(tmp_path: Path) -> None:
    own = environments(tmp_path, GAME.replace("self.guesses, self", "raise OSError('no display'); self.guesses, self"))
    with pytest.raises(DataError, match="its constructor raised: OSError: no display"):
        own.begin(prompts(own.tokenizer), 1)


def test_the_model_must_be_long_enough_for_an_episode() -> None:
    settings: Any = {"environment": "x.py:Game", "max_new_tokens": 16, "max_turns": 4}
    cfg, config = RolloutConfig(**settings), LlamaConfig(max_position_embeddings=64)
    with pytest.raises(ConfigError, match=r"^rollout.episode_tokens 64: the model reads 64"):
        Limits.of(config, cfg.completion_tokens, cfg.length_setting)
    room = Limits.of(config, RolloutConfig(**settings, episode_tokens=40).completion_tokens, cfg.length_setting)
    assert room.prompt_tokens == 24 and room.setting == "rollout.episode_tokens"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no turns": ({"rollout": {"episode_tokens": 9}}, "episode_tokens is set without environment or tools"),
    "elsewhere": ({"rollout": {"environment": "x.py:Game"}, "rewards": {"processes": 1}}, "set rewards.processes to 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_exclude_each_other(name: str) -> None:
    settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        Config.model_validate(settings)
