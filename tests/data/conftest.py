"""Rows written to files, and a tokenizer of single characters that reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vdr_cli.config import DataConfig
from vdr_cli.data.prompts import PromptSet, load_prompts

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role[0] }}>{{ m.content }}{% if not loop.last or m.role != 'assistant' %}|{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
ROWS = [{"prompt": "1+1=", "answer": 2}, {"prompt": "2+3=", "answer": 5}]
OK = {"prompt": "a"}


def character_tokenizer(append_eos: bool = False, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    alphabet = [chr(c) for c in range(32, 127)]
    vocabulary = {token: index for index, token in enumerate(["[pad]", "[eos]", "[bos]", *alphabet])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[pad]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    single = "[bos] $A [eos]" if append_eos else "$A"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("[bos]", 2), ("[eos]", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[pad]", eos_token="[eos]", bos_token="[bos]"
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer()


def text(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def write_jsonl(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def load(path: Path, tokenizer, **settings) -> PromptSet:
    return load_prompts(DataConfig(name=str(path), **settings), "train", tokenizer)
