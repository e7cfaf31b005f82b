"""Limits of the model: prompts that it cannot read, and the check of rows before they are drawn."""

from __future__ import annotations

import pytest

from tests.data.conftest import write_jsonl
from vdr_cli.config import DataConfig
from vdr_cli.data.prompts import Limits, load_prompts
from vdr_cli.errors import ConfigError, DataError


class Longest64:
    """As much of a transformers configuration as matters here."""

    vocab_size = 98
    max_position_embeddings = 64
    rope_parameters: dict | None = None

    def get_text_config(self, decoder: bool = False):
        return self


def test_what_the_model_cannot_read(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt": "x" * 14}, {"prompt": "x" * 15})
    config = DataConfig(name=str(path))
    prompts = load_prompts(config, "train", tokenizer, Limits.of(Longest64(), 50))
    assert len(prompts[0].token_ids) == 14
    with pytest.raises(DataError, match=r"line 2: the prompt has 15 tokens; the model's length leaves 14"):
        prompts[1]
    cut = load_prompts(DataConfig(name=str(path), max_prompt_tokens=14), "train", tokenizer, Limits.of(Longest64(), 50))
    assert len(cut[1].token_ids) == 14
    with pytest.raises(ConfigError, match=r"max_new_tokens 64: the model reads 64 tokens"):
        Limits.of(Longest64(), 64)
    with pytest.raises(DataError, match=r"outside the model's vocabulary of 20"):
        load_prompts(config, "train", tokenizer, Limits(vocabulary=20))[0]


def test_stretched_and_unknown_lengths():
    stretched, unknown = Longest64(), Longest64()
    stretched.rope_parameters = {"rope_type": "yarn", "factor": 4.0}
    unknown.max_position_embeddings = None
    assert Limits.of(stretched, 56).prompt_tokens == 200
    assert Limits.of(unknown, 1000).prompt_tokens is None


def test_rows_are_checked_before_they_are_drawn(tmp_path, tokenizer):
    """A row that the model cannot read is found at the start, and not in the night."""
    path = write_jsonl(tmp_path / "a.jsonl", {"prompt": "x" * 14}, {"prompt": "x" * 15}, {"prompt": "x"})
    limits = Limits.of(Longest64(), 50)
    prompts = load_prompts(DataConfig(name=str(path)), "train", tokenizer, limits)
    prompts.check([2, 0])
    with pytest.raises(DataError, match=r"line 2: the prompt has 15 tokens"):
        prompts.check(range(3))
    cut = load_prompts(DataConfig(name=str(path), max_prompt_tokens=14), "train", tokenizer, limits)
    cut.check(range(3))
    assert not cut.truncated_rows, "only what is drawn counts as cut"


def test_a_template_that_refuses_a_row_is_found_by_the_check(tmp_path, tokenizer, monkeypatch):
    user = {"role": "user", "content": "a"}
    rows = {"prompt": [user]}, {"prompt": [{"role": "system", "content": "b"}, user]}
    path = write_jsonl(tmp_path / "a.jsonl", *rows)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    monkeypatch.setattr(tokenizer, "chat_template", refusing)
    prompts = load_prompts(DataConfig(name=str(path)), "train", tokenizer)
    prompts.check([0])
    with pytest.raises(DataError, match=r"line 2: the chat template refuses the messages: no system"):
        prompts.check([0, 1])
