"""Tokens of conversations under five chat templates: trained ids are the sampled ones, the others the template's."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from tests.environments.conftest import ENDS, TEMPLATES, tokenizer_of
from vdr_cli.config import RolloutConfig
from vdr_cli.data.prompts import Limits, encode
from vdr_cli.environments import between_turns
from vdr_cli.environments.between_turns import ChatTemplate, reply
from vdr_cli.environments.contract import Contract, load_contract
from vdr_cli.environments.episodes import Environments
from vdr_cli.errors import ConfigError
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.samples import Messages, Prompt, Reply, Sampling, Turn

SCHEMA = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12).filter(
    lambda text: "think" not in text and text == text.strip()
)
ROLES = {name: ["user"] if name == "gemma" else ["user", "tool"] for name in TEMPLATES}


@functools.cache
def known(name: str, with_tools: bool) -> tuple[Any, ChatTemplate]:
    tokenizer = tokenizer_of(name)
    return tokenizer, ChatTemplate(tokenizer, [tokenizer.eos_token_id], [SCHEMA] if with_tools else [], "user")


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_appended_tokens_are_those_of_the_whole_conversation(name: str, data: st.DataObject) -> None:
    """Turn by turn, or the template over all of it: the same tokens, and what was sampled is untouched."""
    role = data.draw(st.sampled_from(ROLES[name]))
    tokenizer, between = known(name, role == "tool")
    prompt: Messages = [{"role": "user", "content": "q"}]
    messages, ids = list(prompt), encode(tokenizer, prompt, between.tools or [])
    sampled: list[tuple[int, list[int]]] = []
    for _ in range(data.draw(st.integers(1, 3))):
        said = data.draw(WORDS)
        turn = [*tokenizer(said)["input_ids"], tokenizer.eos_token_id]
        answers = [
            reply(role, data.draw(WORDS), "look", number)
            for number in range(data.draw(st.integers(1, 2)) if role == "tool" else 1)
        ]
        sampled.append((len(ids), turn))
        ids += turn + between.ids(prompt, answers, turn[-1])
        messages += [{"role": "assistant", "content": said}, *answers]
    if not (name == "mistral" and role == "tool" and len(sampled) > 1):  # it wants tool calls in the history
        assert ids == encode(tokenizer, messages, between.tools or [])
    for start, turn in sampled:
        assert ids[start : start + len(turn)] == turn


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_turn_that_ends_without_the_end_token_is_closed_by_the_template(name: str) -> None:
    tokenizer, between = known(name, False)
    prompt: Messages = [{"role": "user", "content": "q"}]
    closed = between.ids(prompt, [reply("user", "a")], tokenizer.eos_token_id)
    open_turn = between.ids(prompt, [reply("user", "a")], 0)
    assert open_turn == [tokenizer.eos_token_id, *closed]
    assert tokenizer.decode(open_turn).startswith(ENDS[name])


def test_the_template_writes_the_same_reply_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And never more pairs than REMEMBERED are kept."""
    monkeypatch.setattr(between_turns, "REMEMBERED", 2)
    tokenizer = tokenizer_of("qwen2.5")
    between = ChatTemplate(tokenizer, [tokenizer.eos_token_id], [], "user")
    between._known.clear()
    written: list[Messages] = []
    monkeypatch.setattr(
        between, "_text", lambda messages, inner=between._text: written.append(messages) or inner(messages)
    )
    prompt: Messages = [{"role": "user", "content": "q"}]
    first = between.ids(prompt, [reply("user", "a")], tokenizer.eos_token_id)
    between.ids(prompt, [reply("user", "a")], tokenizer.eos_token_id).clear()
    assert between.ids(prompt, [reply("user", "a")], 0) == [tokenizer.eos_token_id, *first] and len(written) == 1
    assert between.ids(prompt, [reply("user", "b")], tokenizer.eos_token_id) != first
    between.ids([{"role": "user", "content": "r"}], [reply("user", "a")], 0)
    assert len(written) == 3 and len(between._known) == 1


class Recorded:
    """The episodes' replies, kept."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.said = inner, dict[int, list[tuple[Turn, Reply]]]()

    def replies(self, turns: Sequence[Turn]) -> list[Reply]:
        found: list[Reply] = self.inner.replies(turns)
        for turn, each in zip(turns, found, strict=True):
            self.said.setdefault(turn.row, []).append((turn, each))
        return found


class Counts:
    def __init__(self) -> None:
        self.asked = 0

    def reset(self, **columns: Any) -> str:
        return "!"

    def respond(self, messages: Messages) -> str | None:
        self.asked += 1
        return None if self.asked == 3 else f"{len(messages[-1]['content'])} ☃"


@pytest.mark.parametrize("name", TEMPLATES)
def test_sampled_ids_are_the_trained_ids(name: str) -> None:
    tokenizer = tokenizer_of(name)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **shape)).eval()
    cfg = RolloutConfig(environment="x.py:Counts", max_new_tokens=12, episode_tokens=150, max_turns=4)
    own = Environments(Contract("Counts", Counts), tokenizer, cfg, True, Limits())
    value: Messages = [{"role": "user", "content": "q"}]
    episodes = own.begin([Prompt(0, value, encode(tokenizer, value))], 8)
    ends = list(range(40))  # sampled often enough
    recorded = Recorded(episodes)
    sampling = Sampling(cfg.completion_tokens, turn_tokens=cfg.max_new_tokens)
    ids = [prompt.token_ids for prompt in episodes.prompts]
    request = RolloutRequest(ids, 8, sampling, [5], conversation=recorded)
    out = TransformersRollout(tokenizer.pad_token_id, ends, tokenizer).generate(model, request)
    own.close()
    turns = 0
    for row in range(8):
        expected = [ids for turn, each in recorded.said[row] for ids in (turn.ids, each.ids or [])]
        last = recorded.said[row][-1][0]
        flat = [token for ids in expected for token in ids]
        if not last.ended or recorded.said[row][-1][1].ids is not None:
            flat = flat[: len(flat) - len(recorded.said[row][-1][1].ids or [])]
        assert out.completion_ids[row][out.completion_mask[row]].tolist() == flat
        sampled = [token for turn, _ in recorded.said[row] for token in turn.ids]
        assert out.completion_ids[row][out.policy_mask[row]].tolist() == sampled
        turns += len(recorded.said[row])
        texts = [message["content"] for message in episodes.texts([row], out)[0] if message["role"] == "assistant"]
        assert texts == [tokenizer.decode(turn.ids, skip_special_tokens=True) for turn, _ in recorded.said[row]]
    assert turns > 12 and episodes.prompts[0].value == [{"role": "user", "content": "q!"}]


def test_a_template_that_rewrites_earlier_turns_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ChatTemplate(tokenizer_of("qwen2.5"), [0], [], "user")
        assert not caplog.records
        ChatTemplate(tokenizer_of("qwen3"), [0], [], "user")
    assert "removes <think> from earlier turns; episodes keep every turn as it was sampled" in caplog.text
    moving = tokenizer_of("qwen2.5")
    moving.chat_template = "{{ messages | length }}" + TEMPLATES["qwen2.5"]
    with caplog.at_level(logging.WARNING):
        ChatTemplate(moving, [0], [], "user")
    assert "changes what stands before a turn once it is answered" in caplog.text


REFUSED = {
    "no tools in the template": ("gemma", [SCHEMA], "user", "does not show tools to the model"),
    "no such role": ("mistral", [], "user", "role user after the assistant's: roles must alternate"),
    "drops the answer": ("qwen2.5", [], "user", "leaves out the assistant's words"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_a_template_without_a_place_for_replies_is_refused(fault: str) -> None:
    name, schemas, role, message = REFUSED[fault]
    tokenizer = tokenizer_of(name)
    if fault == "drops the answer":
        tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    if fault == "no such role":
        tokenizer.chat_template = TEMPLATES[name].replace("set ns.user = not ns.user", "set ns.user = true")
    with pytest.raises(ConfigError, match=message):
        ChatTemplate(tokenizer, [0], schemas, role)


def test_tools_need_chat_prompts(tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text("def look():\n    '''Look.'''\n    return 1\n")
    cfg = RolloutConfig(tools=[f"{tmp_path}/tools.py:look"])
    contract = load_contract(None, cfg.tools)
    assert contract is not None
    with pytest.raises(ConfigError, match=r"rollout.tools: tools are offered .* set data.as_chat"):
        Environments(contract, tokenizer_of("plain"), cfg, False, Limits())
