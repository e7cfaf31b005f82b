"""Rows with the columns of each recipe's data set, and a tiny random Qwen2 to run the recipe with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.tiny import character_tokenizer, tiny_qwen2_config

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
    return character_tokenizer()


@pytest.fixture(scope="session")
def tiny_qwen2(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the recipes' architecture, in Hugging Face format."""
    config = tiny_qwen2_config(tokenizer)
    path = tmp_path_factory.mktemp("models") / "tiny-qwen2"
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
