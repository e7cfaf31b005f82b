"""Rows with the columns of each recipe's data set, and a tiny random Qwen2 to run the recipe with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MATHEMATICS = {"problem": "What is 6 times 7?", "solution": "6 \\cdot 7 = \\boxed{42}", "answer": "42"}
ROWS: dict[str, dict[str, Any]] = {
    "tldr": {"prompt": "SUBREDDIT: r/tifu\n\nPOST: I left the door open.\n\nTL;DR:", "completion": " A cat came in."},
    "gsm8k": {"question": "Ann has 6 bags of 7 nuts. How many?", "answer": "6*7=<<6*7=42>>42 nuts.\n#### 42"},
    "7b": MATHEMATICS,
    "32b": MATHEMATICS,
}


@pytest.fixture
def rows(tmp_path: Path):
    """rows(name): a file with rows of the recipe's columns."""

    def write(name: str) -> Path:
        path = tmp_path / f"{name}.rows.jsonl"
        path.write_text("".join(json.dumps(ROWS[name]) + "\n" for _ in range(4)))
        return path

    return write


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a character, and Qwen's chat format."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*special, "\n", *map(chr, range(32, 127))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="session")
def tiny_qwen2(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the recipes' architecture, in Hugging Face format."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    path = tmp_path_factory.mktemp("models") / "tiny-qwen2"
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
