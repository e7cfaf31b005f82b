"""Tool calls: how they are read, made, and answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.environments.conftest import tokenizer_of
from vdr_cli.config import RolloutConfig
from vdr_cli.data.prompts import Limits, encode
from vdr_cli.environments import parsers
from vdr_cli.environments.contract import load_contract
from vdr_cli.environments.episodes import Counts, Environments, ManyTurns
from vdr_cli.environments.parsers import ToolCall, UnreadableCallError
from vdr_cli.errors import ConfigError, DataError
from vdr_cli.samples import Messages, Prompt, Reply, Turn

LOOK = ToolCall("look", {"at": "x"})
READ = {
    "hermes": '<think>so</think><tool_call>\n{"name": "look", "arguments": {"at": "x"}}\n</tool_call>',
    "llama3": '{"name": "look", "parameters": {"at": "x"}}',
    "mistral": '[TOOL_CALLS] [{"name": "look", "arguments": {"at": "x"}}]',
}
TWICE = {
    "hermes": READ["hermes"] * 2,
    "llama3": "<|python_tag|>" + READ["llama3"] + "; " + READ["llama3"],
    "mistral": '[TOOL_CALLS]look[ARGS]{"at": "x"}[TOOL_CALLS]look[ARGS]{"at": "x"}',
}
UNREADABLE = {
    "hermes": ["<tool_call>{", "<tool_call>{}</tool_call>", '<tool_call>{"name": "a", "arguments": 3}</tool_call>'],
    "llama3": ['{"name": "a", ', "<|python_tag|>look()"],
    "mistral": ["[TOOL_CALLS]look", "[TOOL_CALLS]look[ARGS]{", "[TOOL_CALLS][3]"],
}
DEEP = "[" * 200_000
NESTED = {
    "hermes": f"<tool_call>{DEEP}</tool_call>",
    "llama3": '{"name": "look", "parameters": ' + DEEP,
    "mistral": f"[TOOL_CALLS]look[ARGS]{DEEP}",
}


@pytest.mark.parametrize("form", READ)
def test_the_forms_of_calls(form: str) -> None:
    parse = parsers.PARSERS[form]
    assert parse(READ[form]) == [LOOK] and parse(TWICE[form]) == [LOOK, LOOK]
    assert parse("It is 3.") == [] and parse("") == []
    for text in UNREADABLE[form]:
        with pytest.raises(UnreadableCallError):
            parse(text)
    with pytest.raises(UnreadableCallError, match="nested too deep"):
        parse(NESTED[form])
    assert parsers.is_unfinished(NESTED["llama3"])
    assert parsers.is_unfinished(READ[form][:-4]) and not parsers.is_unfinished(READ[form])
    assert not parsers.is_unfinished("It is")


def test_the_form_is_found_in_the_template(tmp_path: Path) -> None:
    forms = {
        name: parsers.parser_of("auto", tokenizer_of(name).chat_template) for name in ("qwen3", "llama3", "mistral")
    }
    assert forms == {"qwen3": parsers.hermes, "llama3": parsers.llama3, "mistral": parsers.mistral}
    assert parsers.parser_of("hermes", "") is parsers.hermes
    with pytest.raises(ConfigError, match=r"rollout\.tool_parser is auto, but"):
        parsers.parser_of("auto", "nothing")
    with pytest.raises(ConfigError, match=r"rollout\.tool_parser is auto, but"):
        parsers.parser_of("auto", "<tool_call>\n<function={{ name }}>\n<parameter=a>")  # in XML: hermes cannot read it
    (tmp_path / "mine.py").write_text("def calls(text):\n    return [{'name': text.split()[0]}]\n")
    own = parsers.parser_of(f"{tmp_path}/mine.py:calls", "")
    assert own("look here") == [ToolCall("look", {})]
    with pytest.raises(UnreadableCallError, match="IndexError"):
        own("")


ROOM = '''
import time

class Room:
    """A room."""

    def reset(self, **columns):
        self.seen = []
        self.is_closed = False

    def look(self, at: str) -> str:
        """
        Look at something.

        Args:
            at: What to look at.
        """
        self.seen.append(at)
        if at == "sun":
            raise ValueError("too bright")
        return f"a {at}"

    def count(self) -> int:
        """A number that Python refuses to write."""
        return 10**5000

    def half(self) -> str:
        """Text that is not UTF-8."""
        return "a \\udc80 b"

    async def wait(self, seconds: float) -> str:
        """
        Wait.

        Args:
            seconds: How long.
        """
        import asyncio
        await asyncio.sleep(seconds)
        return "waited"

    def _hidden(self):
        return 0

    def close(self):
        self.is_closed = True

def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b
'''


def a_room(tmp_path: Path, name: str = "qwen2.5", **settings: Any) -> ManyTurns:
    path = tmp_path / "room.py"
    path.write_text(ROOM)
    cfg = RolloutConfig(environment=f"{path}:Room", tools=[f"{path}:add"], **settings)
    contract, tokenizer = load_contract(cfg.environment, cfg.tools), tokenizer_of(name)
    assert contract is not None
    assert [tool.name for tool in contract.tools] == ["add", "count", "half", "look", "wait"]
    own = Environments(contract, tokenizer, cfg, True, Limits())
    value: Messages = [{"role": "user", "content": "q"}]
    return own.begin([Prompt(3, value, encode(tokenizer, value, contract.schemas))], 4)


def said(episodes: ManyTurns, row: int, text: str, ended: bool = True) -> Reply:
    tokenizer = episodes.owner.tokenizer
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * ended
    (found,) = episodes.replies([Turn(row, ids, ended, 1000)])
    return found


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_calls_are_made_in_order_and_their_results_go_back(tmp_path: Path) -> None:
    episodes = a_room(tmp_path)
    found = said(episodes, 0, "I look. " + call("look", at="sun") + call("add", a=2, b=3) + call("wait", seconds=0))
    text = episodes.owner.tokenizer.decode(found.ids)
    results = ["{'error': 'too bright'}", "5", "waited"]
    expected = "".join(f"<tool_response>\n{result}\n</tool_response>" for result in results)
    assert text == f"\n<|im_start|>user{expected}<|im_end|>\n<|im_start|>assistant\n"
    assert said(episodes, 0, "It is 5.").ids is None
    messages = episodes.texts([0], None)[0]  # type: ignore[arg-type]
    assert [message["role"] for message in messages] == ["assistant", "tool", "tool", "tool", "assistant"]
    assert [message["name"] for message in messages[1:4]] == ["look", "add", "wait"]
    assert episodes.counts[0] == Counts(turns=2, calls=3, failures=1)
    assert (episodes.environments or [])[0].seen == ["sun"] and not (episodes.environments or [])[1].seen
    episodes.close()
    assert all(each.is_closed for each in episodes.environments or [])


WRONG = {
    "no such tool": (call("run"), "Tool run not found", Counts(1, 1, 1)),
    "hidden": (call("_hidden"), "Tool _hidden not found", Counts(1, 1, 1)),
    "reset": (call("reset"), "Tool reset not found", Counts(1, 1, 1)),
    "wrong arguments": (call("look", on="x"), "unexpected keyword argument 'on'", Counts(1, 1, 1)),
    "late": (call("wait", seconds=60), "no result after 0.2 s", Counts(1, 1, 1)),
    "no text": (call("count"), "Exceeds the limit", Counts(1, 1, 1)),
    "half a pair in its name": ('<tool_call>{"name": "\\udc80"}</tool_call>', "not found", Counts(1, 1, 1)),
    "unreadable": ("<tool_call>{look}</tool_call>", "the tool call cannot be read: it is not JSON", Counts(1, 0, 0, 1)),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_call_is_answered_and_counted(tmp_path: Path, fault: str) -> None:
    text, message, counts = WRONG[fault]
    episodes = a_room(tmp_path, tool_timeout=0.2)
    answer = episodes.owner.tokenizer.decode(said(episodes, 2, text).ids)
    assert message in answer and "{'error':" in answer.replace('{"error":', "{'error':")
    assert episodes.counts[2] == counts
    episodes.owner.close()


def test_text_that_no_tokenizer_takes_is_mended(tmp_path: Path) -> None:
    episodes = a_room(tmp_path)
    answer = episodes.owner.tokenizer.decode(said(episodes, 2, call("half")).ids)
    assert "a \ufffd b" in answer and episodes.counts[2] == Counts(1, 1, 0)


def test_a_template_that_refuses_a_reply_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    episodes = a_room(tmp_path)

    def refuse(*_: Any) -> list[int]:
        raise ValueError("roles must alternate")

    monkeypatch.setattr(episodes.owner.between, "ids", refuse)
    with pytest.raises(DataError, match="the reply on dataset row 3: the chat template refuses the messages: roles"):
        said(episodes, 0, call("look", at="x"))


def test_an_episode_cut_in_a_call_is_marked(tmp_path: Path) -> None:
    episodes = a_room(tmp_path)
    assert said(episodes, 1, call("look", at="x")[:-6], ended=False).ids is None
    assert said(episodes, 2, "It is", ended=False).ids is None
    assert [each.cut_in_call for each in episodes.counts] == [False, True, False, False]
    assert not (episodes.environments or [])[1].seen


def test_special_tokens_that_mark_a_call_are_read(tmp_path: Path) -> None:
    episodes = a_room(tmp_path, "mistral")
    found = said(episodes, 0, '[TOOL_CALLS][{"name": "look", "arguments": {"at": "moon"}}]')
    assert episodes.owner.tokenizer.decode(found.ids) == "[TOOL_RESULTS]a moon[/TOOL_RESULTS]"


def test_two_tools_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "room.py").write_text(
        ROOM + "\ndef look(at: str):\n    '''Look.\n\n    Args:\n        at: Place.\n    '''\n"
    )
    with pytest.raises(ConfigError, match="two tools are called look; rename one"):
        load_contract(f"{tmp_path}/room.py:Room", [f"{tmp_path}/room.py:look"])
