"""Conversations: the assistant's tokens alone are measured, under everything that stands before them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.environments.conftest import ENDS, TEMPLATES, tokenizer_of
from vdr_cli.config import DisagreementConfig
from vdr_cli.data.prompts import encode
from vdr_cli.disagreement.hooks import ensemble
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.environments.between_turns import reply
from vdr_cli.errors import DataError
from vdr_cli.models.loading import load_causal_lm, load_tokenizer
from vdr_cli.scoring.cells import MESSAGES
from vdr_cli.scoring.request import Fields, ScoreRequest
from vdr_cli.scoring.score import run_score
from vdr_cli.scoring.sources import Row
from vdr_cli.scoring.tokens import Item, Tokeniser

M = 3
ENSEMBLE = DisagreementConfig(members=M)
CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{% else %}{{ m.content }}:{% endif %}{% endfor %}"
)
ASKED = {"role": "user", "content": "1 2 3=6"}
TURNS = [
    {"role": "assistant", "content": "1+2"},
    {"role": "user", "content": "3=3"},
    {"role": "assistant", "content": "1+2+3"},
    {"role": "user", "content": "9"},
]


@cache
def model_in(name: str, dtype: torch.dtype, *_: Any) -> Any:
    return load_causal_lm(name, dtype)


@cache
def chatty(*_: Any) -> Any:
    tokenizer = load_tokenizer("starter")
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(autouse=True)
def one_model_with_a_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vdr_cli.scoring.score.load_causal_lm", model_in)
    monkeypatch.setattr("vdr_cli.scoring.score.load_tokenizer", chatty)


def scored(tmp_path: Path, rows: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_score(ScoreRequest((str(given),), "starter", str(out), **({"disagreement": ENSEMBLE, "tokens": True} | more)))
    return [json.loads(line) for line in out.read_text().splitlines()]


def plain(text: str) -> list[int]:
    return list(load_tokenizer("starter")(text, add_special_tokens=False)["input_ids"])


def conversation() -> tuple[list[int], list[int], list[bool]]:
    """Prompt, completion and the assistant's places in it, written out by hand; the last turn is left open."""
    end = [chatty().eos_token_id]
    parts = [(plain("1+2") + end, True), (plain("3=3:"), False), (plain("1+2+3"), True)]
    return (
        plain("1 2 3=6:"),
        [token for ids, _ in parts for token in ids],
        [is_own for ids, is_own in parts for _ in ids],
    )


def reference(prompt: list[int], completion: list[int], own: list[bool]) -> dict[str, float]:
    """From the definitions: one row, no padding, float64, all positions read and the assistant's picked afterwards."""
    model = model_in("starter", torch.float64)
    ids, first = torch.tensor([prompt + completion]), len(prompt) - 1
    at = np.flatnonzero(own)
    y = np.array(completion)[at]

    def logs() -> Any:
        with torch.no_grad():
            found = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1).numpy()
        return found[first + at]  # (assistant's tokens, V)

    base, members = logs(), []
    for member in range(M):
        with ensemble(model, EnsembleSpec(**ENSEMBLE.member_settings), 0, range(member, member + 1)):
            members.append(logs())
    p, mean = np.exp(members), np.exp(members).mean(0)
    bald = -(mean * np.log(mean)).sum(-1) + (p * np.array(members)).sum(-1).mean(0)
    entropy = -(np.exp(base) * base).sum(-1)
    picked = np.arange(len(y))
    member_logps = np.array(members)[:, picked, y]
    sums = member_logps.sum(1)
    return {
        "n_tokens": len(y),
        "nll_sum": -base[picked, y].sum(),
        "entropy_mean": entropy.mean(),
        "entropy_max": entropy.max(),
        "bald_mean": bald.mean(),
        "bald_sum": bald.sum(),
        "bald_max": bald.max(),
        "bald_eos": bald[-1],
        "rmi_mean": (np.log(mean[picked, y]) - member_logps.mean(0)).mean(),
        "rmi_seq": (np.log(np.exp(sums - sums.max()).mean()) + sums.max() - sums.mean()) / len(y),
    }


def test_a_conversation_measures_the_assistants_tokens_as_a_float64_reference_does(tmp_path: Path) -> None:
    """As messages, as prompt and completion, as ids with a mask, next to rows of one turn: the same numbers."""
    prompt, completion, own = conversation()
    rows = [
        {"messages": [ASKED, *TURNS]},
        {"prompt": [ASKED], "completion": TURNS},
        {"prompt_ids": prompt, "completion_ids": completion, "policy_mask": own, "completion": TURNS},
        {"prompt": "1 2 3=6:", "completion": "1+2+3"},
        {"messages": json.dumps([ASKED, *TURNS])},
    ]
    found = scored(tmp_path, rows)
    expected = reference(prompt, completion, own)
    for row in (found[0], found[1], found[2], found[4]):
        assert row["token_ids"] == completion
        assert [value is not None for value in row["token_logp"]] == own
        assert [value is not None for value in row["token_bald"]] == own
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=2e-5, abs=2e-7), name
    assert found[3]["n_tokens"] == 5 and None not in found[3]["token_logp"]
    assert sum(v for v in found[0]["token_bald"] if v is not None) == pytest.approx(expected["bald_sum"], rel=2e-5)


def test_strings_between_turns_and_the_end_of_the_last(tmp_path: Path) -> None:
    row = {"prompt": "1 2 3=6:", "completion": TURNS}
    (found,) = scored(tmp_path, [row], append_eos=True, disagreement=None)
    end = chatty().eos_token_id
    assert found["token_ids"] == [*plain("1+2"), *plain("3=3"), *plain("1+2+3"), end]
    assert found["n_tokens"] == 3 + 6
    (cut,) = scored(tmp_path, [row], max_tokens=4, disagreement=None)
    assert cut["token_ids"] == plain("1+2") + plain("3=3") + plain("1") and cut["n_tokens"] == 4


def test_reward_functions_see_the_messages(tmp_path: Path) -> None:
    from vdr_cli.config import RewardsConfig

    reward = tmp_path / "count.py"
    reward.write_text("def turns(completions, **columns):\n    return [float(len(each)) for each in completions]\n")
    rewards = RewardsConfig.model_validate({"functions": [{"name": f"{reward}:turns"}]})
    rows = [{"messages": [ASKED, *TURNS]}, {"prompt": [ASKED], "completion": "1"}]
    found = scored(tmp_path, rows, rewards=rewards, disagreement=None)
    assert [row["reward"] for row in found] == [4.0, 1.0]


def test_a_conversation_in_which_the_policy_says_nothing_is_empty(tmp_path: Path) -> None:
    (found,) = scored(tmp_path, [{"messages": [ASKED, {"role": "assistant", "content": ""}]}])
    assert found["n_tokens"] == 0 and found["bald_mean"] is None


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"messages": [ASKED]}, "no message of the assistant"),
        ({"messages": TURNS}, "begins with the assistant"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": [ASKED, {"role": "assistant", "content": ["x"]}]}, "role assistant holds list, not text"),
        ({"messages": [ASKED, {"role": "assistant"}]}, "messages must be a list of messages with role and content"),
        ({"messages": [ASKED, {"role": "assistant", "content": "\ud800"}]}, "half of a surrogate pair"),
        ({"prompt": [ASKED], "completion": [ASKED, *TURNS]}, "the first of them the assistant's"),
        ({"prompt": [ASKED], "completion": TURNS, "tools": "add"}, "tools must be a list"),
        ({"prompt_ids": [3], "completion_ids": [4, 5], "policy_mask": [1]}, "policy_mask must be a list of 2 booleans"),
        (
            {"prompt": "1:", "completion": [{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]},
            "has tool_calls, which needs a chat template: give the prompt as messages",
        ),
    ],
)
def test_a_bad_row_is_one_line_with_its_number(tmp_path: Path, row: dict[str, Any], named: str) -> None:
    with pytest.raises(DataError) as failed:
        scored(tmp_path, [row], disagreement=None)
    line = str(failed.value)
    assert named in line and "line 1" in line and "\n" not in line


def item_of(name: str, row: dict[str, Any]) -> Item:
    tokenizer = tokenizer_of(name)
    eos = (tokenizer.eos_token_id,)
    rows = [Row("f.jsonl", 1, row)]
    found = Tokeniser(tokenizer, Fields(), len(tokenizer), None, True, None, eos_ids=eos).items(rows)
    assert rows[0].error is None, rows[0].error
    return found[0]


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"gemma"}))
def test_tokens_are_the_templates_and_the_mask_marks_the_assistants_words(name: str) -> None:
    answer = reply("user" if name == "mistral" else "tool", "red", "look")
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "first"},
        answer,
        {"role": "assistant", "content": "second"},
    ]
    item, tokenizer = item_of(name, {MESSAGES: messages}), tokenizer_of(name)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = item.prompt_ids + item.completion_ids
    assert whole.startswith(tokenizer.decode(ids))  # a line's end behind the last turn is no part of it
    assert item.policy is not None
    own = [token for token, is_own in zip(item.completion_ids, item.policy, strict=True) if is_own]
    assert tokenizer.decode(own) == f"first{ENDS[name]}second{ENDS[name]}"


def test_calls_as_objects_are_written_by_the_template() -> None:
    tokenizer = tokenizer_of("qwen2.5")
    said = "{{ m.content }}"
    calls = "{% if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>"
    calls += "{% endfor %}{% endif %}"
    tokenizer.chat_template = TEMPLATES["qwen2.5"].replace(f"{said}<|im_end|>", f"{said}{calls}<|im_end|>")
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "red"},
        {"role": "assistant", "content": "red"},
    ]
    rows = [Row("f.jsonl", 1, {MESSAGES: messages, "tools": [{"type": "function"}]})]
    tokeniser = Tokeniser(tokenizer, Fields(), len(tokenizer), None, False, None, eos_ids=(tokenizer.eos_token_id,))
    (item,) = tokeniser.items(rows)
    assert item.policy is not None and item.prompt_ids == encode(tokenizer, messages[:1], [{"type": "function"}])
    own = [token for token, is_own in zip(item.completion_ids, item.policy, strict=True) if is_own]
    text = tokenizer.decode(own)
    assert text.startswith("<tool_call>{") and text.endswith("</tool_call><|im_end|>red")
    assert len(own) < len(item.completion_ids)


def test_thoughts_beside_the_answer_are_written_by_the_template() -> None:
    """TRL's logs of thinking models: without the thought another text would be measured."""
    tokenizer = tokenizer_of("qwen2.5")
    said, thought = "{{ m.content }}", "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    tokenizer.chat_template = TEMPLATES["qwen2.5"].replace(f"{said}<|im_end|>", f"{thought}{said}<|im_end|>")
    tokeniser = Tokeniser(tokenizer, Fields(), len(tokenizer), None, False, None, eos_ids=(tokenizer.eos_token_id,))
    answer = [{"role": "assistant", "reasoning_content": "why", "content": "red", "tool_calls": None}]
    row = Row("f.jsonl", 1, {"prompt": [{"role": "user", "content": "q"}], "completion": answer})
    (item,) = tokeniser.items([row])
    assert tokenizer.decode(item.completion_ids) == "<think>why</think>red"
    plain = Row("f.jsonl", 2, {"prompt": "q", "completion": answer})
    assert tokeniser.items([plain]) == []
    assert plain.error is not None and "has reasoning_content, which needs a chat template" in plain.error
